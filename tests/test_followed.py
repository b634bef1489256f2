"""Units are followed through what docs/nodes.md says: one that is always 0 goes, and so does a constant."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from planting import plant
from test_compression import busy, compressed, data, units

ZERO, CONSTANT = 1, 3


class Through(nn.Module):
    """Six channels behind a ReLU go through something on their way to the last layer."""

    def __init__(self, between, last):
        super().__init__()
        self.first = plant(busy(nn.Conv2d(3, 6, 1)), {ZERO: "true", CONSTANT: "constant"})
        self.between, self.last = between, last

    def forward(self, x):
        return self.last(self.between(functional.relu(self.first(x))))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Matrix(nn.Module):
    """A bare matrix, as a product or with a bias of its own."""

    def __init__(self, features, *, biased):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(features, 2))
        self.shift = nn.Parameter(torch.randn(2)) if biased else None

    def forward(self, x):
        x = x.mean((2, 3))
        return x @ self.matrix if self.shift is None else torch.addmm(self.shift, x, self.matrix)


def norm():
    made = nn.InstanceNorm2d(6, affine=True)
    nn.init.uniform_(made.bias)
    return made


def pointwise():
    return nn.Conv2d(6, 2, 1)


BOTH, ZERO_ALONE = {ZERO, CONSTANT}, {ZERO}
WAYS = {
    "nothing": (nn.Identity, pointwise, BOTH),
    "a product with a bare matrix": (nn.Identity, lambda: Matrix(6, biased=False), ZERO_ALONE),
    "addmm": (nn.Identity, lambda: Matrix(6, biased=True), BOTH),
    "a transposed convolution": (nn.Identity, lambda: nn.ConvTranspose2d(6, 2, 2), ZERO_ALONE),
    "dropout in evaluation": (nn.Dropout2d, pointwise, BOTH),
    "PReLU": (lambda: nn.PReLU(6), pointwise, BOTH),
    "instance norm": (norm, pointwise, set()),
    "a slice of numbered places": (
        lambda: Function(lambda x: x[:, 1:5]), lambda: nn.Conv2d(4, 2, 1), set(),
    ),
    "halves, joined": (
        lambda: Function(lambda x: torch.cat(x.chunk(2, 1), 1)), pointwise, BOTH,
    ),
    "another order": (lambda: Function(lambda x: x.flip(1)), pointwise, BOTH),
    "reshaped": (
        lambda: Function(lambda x: x.permute(0, 2, 3, 1).reshape(len(x), -1, x.shape[1])),
        lambda: nn.Linear(6, 2),
        BOTH,
    ),
    "flattened": (nn.Flatten, lambda: nn.Linear(96, 2), BOTH),
    "an average": (lambda: nn.AvgPool2d(2), pointwise, BOTH),
    "a maximum": (lambda: nn.MaxPool2d(2), pointwise, BOTH),
    "a mean over positions": (
        lambda: Function(lambda x: x.mean((2, 3))), lambda: nn.Linear(6, 2), BOTH,
    ),
    "a sum over positions": (
        lambda: Function(lambda x: x.sum((2, 3))), lambda: nn.Linear(6, 2), ZERO_ALONE,
    ),
    "zeros around": (nn.Identity, lambda: nn.Conv2d(6, 2, 3, padding=1), ZERO_ALONE),
    "padded by a function": (
        lambda: Function(lambda x: functional.pad(x, (1, 1, 1, 1))), lambda: nn.Conv2d(6, 2, 3), ZERO_ALONE,
    ),
    "mirrored at the borders": (
        nn.Identity, lambda: nn.Conv2d(6, 2, 3, padding=1, padding_mode="reflect"), BOTH,
    ),
    "resized": (lambda: nn.Upsample(scale_factor=2), pointwise, BOTH),
    "a line for all": (lambda: Function(lambda x: 1 - x * 0.5), pointwise, BOTH),
    "concatenated with itself": (
        lambda: Function(lambda x: torch.cat([x, 2 * x], 1)), lambda: nn.Conv2d(12, 2, 1), BOTH,
    ),
    "a softmax": (lambda: nn.Softmax(1), pointwise, set()),
    "a layer norm": (lambda: nn.LayerNorm([6, 4, 4]), pointwise, set()),
    "a group norm": (lambda: nn.GroupNorm(2, 6), pointwise, set()),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_units_go_or_are_listed(name):
    between, last, gone = WAYS[name]
    model = Through(between(), last()).double().eval()
    small, report, _ = compressed(model, data(80, 3, 4, 4))
    assert units(report.removed, "first") == gone
    assert units(report.kept, "first") >= BOTH - gone
    assert small.first.out_channels == 6 - len(gone)
