"""What a compression did, as values and in words."""

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from truestep.measuring import Size
from truestep.plan import Kept, Removal

__all__ = ["CompressionReport"]


@dataclass
class CompressionReport:
    """What `compress` did.

    Attributes:
        removed: the units that went, in the order of the layers.
        kept: the redundant units that stayed, with the reason.
        before: the model's size.
        after: the small model's.
        difference: the largest difference of outputs on the data.
        largest: the largest magnitude of the model's outputs there.
        compared: how many samples were compared.
        tolerance: the largest difference that passes, relative to `largest`: rounding in another order of
            summation, and constants and duplicates that are so up to rounding.
        structure: what else but sizes has changed, for `shrink_to`.
    """

    removed: list[Removal] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    before: Size = field(default_factory=Size)
    after: Size = field(default_factory=Size)
    difference: float = 0.0
    largest: float = 0.0
    compared: int = 0
    tolerance: float = 0.0
    structure: dict[str, Any] = field(default_factory=dict)

    def checkpoint(self, small: nn.Module) -> dict[str, Any]:
        """What `torch.save` has to keep for `shrink_to`: plain containers and tensors.

        Args:
            small: the model that came with this report, trained further or not.
        """
        return {"state_dict": small.state_dict(), "structure": copy.deepcopy(self.structure)}

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for JSON."""
        return {
            "removed": [vars(one) for one in self.removed],
            "kept": [vars(one) for one in self.kept],
            "before": vars(self.before),
            "after": vars(self.after),
            "difference": self.difference,
            "largest": self.largest,
            "compared": self.compared,
            "tolerance": self.tolerance,
        }

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("", "before", "after")]
        for name, unit in (("parameters", ""), ("flops", ""), ("seconds", "s"), ("bytes", "")):
            pair = (getattr(self.before, name), getattr(self.after, name))
            shown = (f"{value:.3g} s" if unit else f"{value:,}" for value in pair)
            lines.append((name, *shown))
        text = "\n".join(f"{name:<12}{one:>16}{other:>16}" for name, one, other in lines)
        return (
            f"{text}\nremoved {len(self.removed)} units, kept {len(self.kept)} redundant ones; largest "
            f"difference {self.difference:.3g} at outputs up to {self.largest:.3g} on {self.compared} samples"
        )
