"""Trains a small language model with aSGD in Hugging Face's Trainer: accumulation and clipping.

    python examples/train_huggingface.py

The model is made from a configuration; nothing is downloaded.
"""

import tempfile

import torch
import transformers
from torch import Tensor

import truestep
from truestep.integrations.huggingface import MeanEffectiveGradient

WORDS = 200


class Trainer(MeanEffectiveGradient, transformers.Trainer):
    """The Trainer, with gradients corrected before `max_grad_norm` clips them."""


class Report(transformers.TrainerCallback):
    def on_log(self, args: object, state: object, control: object, logs: dict, **_: object) -> None:
        if "loss" in logs:
            print(f"epoch {logs['epoch']:.0f}: loss {logs['loss']:.4f}")


def sentences() -> list[dict[str, Tensor]]:
    """400 sequences of 16 words, each following from the one before; the first words are rare."""
    following = torch.randperm(WORDS)
    rows = [torch.randint(0, WORDS, (400,))]
    for _ in range(15):
        rows.append(following[rows[-1]] // 2)
    tokens = torch.stack(rows, 1)
    return [{"input_ids": row, "labels": row} for row in tokens]


def main() -> None:
    transformers.set_seed(0)
    model = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=WORDS,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
        )
    )
    # The loss is an average over tokens, so each position counts as a sample.
    counter = truestep.SampleCounter(model, unit="position")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=folder,
                num_train_epochs=4,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                max_grad_norm=1.0,
                learning_rate=3e-3,
                use_cpu=True,
                logging_strategy="epoch",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=sentences(),
            callbacks=[Report()],
            counter=counter,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    print(truestep.monitor.table(counter.statistics(), rows=5))


if __name__ == "__main__":
    main()
