"""Hugging Face: a Trainer that turns gradients into mean effective gradients before it clips them."""

from typing import Any

import truestep

__all__ = ["MeanEffectiveGradient"]


class MeanEffectiveGradient:
    """aSGD for `transformers.Trainer` and its subclasses, as a base class in front of them.

    It corrects gradients, g <- g N / (m + eps) where m > 0, after the last backward pass of a step and
    before `max_grad_norm`, 1.0 by default, clips them. A `TrainerCallback` would come too late: the
    first one that sees the gradients, `on_pre_optimizer_step`, runs after clipping. The optimizer is the
    Trainer's own or any other; `truestep.AdaptiveBatchSGD` does not correct the gradients again.

    Args:
        args: the Trainer's.
        counter: of the Trainer's model.
        eps: added to the adaptive batch size m.
        factor_limit: the largest N / (m + eps) allowed; None for no limit.
        log_statistics: log `counter.statistics()` beside the loss.
        kwargs: the Trainer's.

    Raises:
        TruestepError: at the step, a parameter of the Trainer's model is not of the counter's model.

    Example:
        >>> import transformers, truestep
        >>> from truestep.integrations.huggingface import MeanEffectiveGradient
        >>> class Trainer(MeanEffectiveGradient, transformers.Trainer):
        ...     pass
        >>> # Trainer(model=model, args=..., counter=truestep.SampleCounter(model)).train()
    """

    def __init__(
        self,
        *args: Any,
        counter: truestep.SampleCounter,
        eps: float = 1.0,
        factor_limit: float | None = None,
        log_statistics: bool = False,
        **kwargs: Any,
    ) -> None:
        truestep.mean_effective_gradient(counter, eps=eps, factor_limit=factor_limit)  # checks them
        super().__init__(*args, **kwargs)
        self._counter = counter
        self._eps, self._factor_limit = eps, factor_limit
        self._log_statistics = log_statistics

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a batch forward and backward; after a step's last one, corrects the gradients."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            self._counter.correct_gradients(
                self.model.parameters(),  # type: ignore[attr-defined]
                eps=self._eps,
                factor_limit=self._factor_limit,
            )
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs, with the statistics beside the training loss."""
        if self._log_statistics and "loss" in logs:
            logs = logs | truestep.monitor.scalars(self._counter.statistics(eps=self._eps))
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
