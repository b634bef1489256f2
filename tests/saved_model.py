"""What `truestep nodes` and `truestep compress` are given in tests."""

import torch
from torch import nn

from planting import plant


def make():
    layers = [
        nn.Linear(8, 12),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(12, 5),
        nn.GELU(),
        nn.Linear(5, 3),
    ]
    return nn.Sequential(*layers)


torch.manual_seed(0)
model = make()
plant(model[0], {1: "true", 2: "true", 3: "constant", 4: ("duplicate", 0, 2.0), 5: "pseudo"})
loader = [torch.randn(64, 8).clamp(-3, 3) for _ in range(10)]
print("a user may print")  # noqa: T201
