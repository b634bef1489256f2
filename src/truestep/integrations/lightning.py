"""Lightning: a callback that turns gradients into mean effective gradients before they are clipped."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

import truestep

__all__ = ["MeanEffectiveGradient"]


class MeanEffectiveGradient(Callback):
    """aSGD in front of the optimizers of a `LightningModule`: g <- g N / (m + eps) where m > 0.

    It corrects gradients after the last backward pass of a step and before `gradient_clip_val` clips
    them. The optimizer is any of torch's; `truestep.AdaptiveBatchSGD` does not correct them again.

    Args:
        counter: of the module that `training_step` calls on whole batches.
        eps: added to the adaptive batch size m.
        factor_limit: the largest N / (m + eps) allowed; None for no limit.
        log_statistics: send `counter.statistics()` to the trainer's loggers, as often as
            `log_every_n_steps` says.

    Raises:
        TruestepError: at the step, a parameter of the optimizer is not of the counter's model.

    Example:
        >>> import torch, truestep
        >>> from lightning.pytorch import LightningModule
        >>> from truestep.integrations.lightning import MeanEffectiveGradient
        >>> class Classifier(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(20, 2)
        ...     def training_step(self, batch):
        ...         inputs, targets = batch
        ...         return torch.nn.functional.cross_entropy(self.net(inputs), targets)
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> model = Classifier()
        >>> callback = MeanEffectiveGradient(truestep.SampleCounter(model.net))
        >>> # Trainer(callbacks=[callback], gradient_clip_val=1.0).fit(model, loader)
    """

    def __init__(
        self,
        counter: truestep.SampleCounter,
        *,
        eps: float = 1.0,
        factor_limit: float | None = None,
        log_statistics: bool = False,
    ) -> None:
        truestep.mean_effective_gradient(counter, eps=eps, factor_limit=factor_limit)  # checks them
        self._counter = counter
        self._eps, self._factor_limit = eps, factor_limit
        self._log_statistics = log_statistics

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Corrects the gradients of the optimizer's parameters."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._counter.correct_gradients(parameters, eps=self._eps, factor_limit=self._factor_limit)
        step = trainer.global_step
        if self._log_statistics and (step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            found: dict[str, Any] = truestep.monitor.scalars(
                self._counter.statistics(eps=self._eps)
            )
            for logger in trainer.loggers:
                logger.log_metrics(found, step=step)
