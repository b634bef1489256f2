"""Trains with aSGD in Lightning: accumulation, clipping, bfloat16, and a run that can be resumed.

    python examples/train_lightning.py --epochs 2 --checkpoint run.ckpt
    python examples/train_lightning.py --checkpoint run.ckpt
    torchrun --nproc-per-node 2 examples/train_lightning.py

The second run goes on where the first one stopped; the third has two processes.
"""

import argparse
import os
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import truestep
from truestep.integrations.lightning import MeanEffectiveGradient


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.EmbeddingBag(820, 16), nn.ReLU(), nn.Linear(16, 8))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        words, targets = batch
        loss = functional.cross_entropy(self.net(words), targets)
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        return loss

    def on_train_epoch_end(self) -> None:
        loss = self.trainer.callback_metrics["loss_epoch"]
        self.print(f"epoch {self.current_epoch + 1}: loss {loss:.4f}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.9)


def data() -> DataLoader:
    """2,000 bags of 8 words; a class has words of its own, and frequent ones are shared by all."""
    targets = torch.randint(0, 8, (2000,))
    own = targets[:, None] * 100 + torch.randint(0, 100, (2000, 4))
    shared = torch.randint(800, 820, (2000, 4))
    return DataLoader(TensorDataset(torch.cat([own, shared], 1), targets), 32, shuffle=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--checkpoint", type=Path, help="read at the start, written at the end")
    arguments = parser.parse_args()
    seed_everything(0)
    batches, model = data(), Classifier()
    counter = truestep.SampleCounter(model.net)  # the module that training_step calls
    trainer = Trainer(
        max_epochs=arguments.epochs,
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        precision="bf16-mixed",
        accumulate_grad_batches=4,
        gradient_clip_val=1.0,
        callbacks=[MeanEffectiveGradient(counter)],  # corrects before the trainer clips
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    saved = arguments.checkpoint
    trainer.fit(model, batches, ckpt_path=saved if saved and saved.exists() else None)
    if saved:
        trainer.save_checkpoint(saved)


if __name__ == "__main__":
    main()
