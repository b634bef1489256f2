"""The models and batches that are measured: what a training step works on."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

INK = 0.2  # the share of MNIST's pixels that are not black


@dataclass(frozen=True)
class Task:
    """A model, a loss and one batch; what a sample is."""

    model: nn.Module
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    unit: str = "sample"

    def backward(self) -> None:
        """Forward and backward pass."""
        self.loss_fn(self.model(self.inputs), self.targets).backward()


def mlp(*sizes: int, batch: int) -> Task:
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    inputs = torch.rand(batch, sizes[0]) * (torch.rand(batch, sizes[0]) < INK)
    return classify(nn.Sequential(*layers[:-1]), inputs)


def classify(model: nn.Module, inputs: Tensor) -> Task:
    return Task(model, nn.CrossEntropyLoss(), inputs, torch.randint(0, 10, (len(inputs),)))


def cnn() -> Task:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 14 * 14, 10),
    )
    return classify(model, torch.rand(64, 1, 28, 28))


def bag() -> Task:
    model = nn.Sequential(nn.EmbeddingBag(100_000, 32), nn.ReLU(), nn.Linear(32, 10))
    return classify(model, torch.randint(0, 100_000, (256, 17)))


class Block(nn.Module):
    """A pre-norm transformer block with fused attention."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = split.transpose(-4, -2).unbind(-3)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.out(mixed.transpose(-3, -2).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """A language model with learned positions."""

    def __init__(self, tokens: int, length: int, width: int, depth: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        places = places.expand_as(x)  # a row for each sample: all peers take it
        return self.head(self.blocks(self.tokens(x) + self.positions(places)))


def language_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gpt(unit: str) -> Task:
    tokens, shape = 256, (8, 128)
    model = GPT(tokens, shape[1], width=256, depth=4)
    inputs, targets = (torch.randint(0, tokens, shape) for _ in range(2))
    return Task(model, language_loss, inputs, targets, unit)


TASKS: dict[str, Callable[[], Task]] = {
    "784-30-20-10 b64": lambda: mlp(784, 30, 20, 10, batch=64),
    "784-128-128-10 b256": lambda: mlp(784, 128, 128, 10, batch=256),
    "784-1024-1024-10 b256": lambda: mlp(784, 1024, 1024, 10, batch=256),
    "784-2048-2048-10 b1024": lambda: mlp(784, 2048, 2048, 10, batch=1024),
    "cnn b64": cnn,
    "gpt b8 by sample": lambda: gpt("sample"),
    "gpt b8 by position": lambda: gpt("position"),
    "bag of 100,000 b256": bag,
}


def task_on(device: str, name: str) -> Task:
    """A task of `TASKS` whose tensors are all on a device; the same one each time."""
    torch.manual_seed(0)
    with torch.device(device):
        return TASKS[name]()
