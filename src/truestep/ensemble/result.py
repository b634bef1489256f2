"""What an ensemble returns: arrays by replica, in memory or read from the store when they are asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truestep.ensemble.settings import SPLITS
from truestep.errors import TruestepError

__all__ = ["Result"]

Part = Mapping[str, NDArray[Any]] | Path


class Result:
    """The replicas of a training, in the order of their numbers.

    Attributes:
        steps: int64 ``[measured]``, after how many steps was measured.
        backend: "compiled" or "torch", what computed.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Part, slice]],
        steps: NDArray[np.int64],
        wanted: Sequence[str],
        backend: str,
    ) -> None:
        self._parts, self._wanted = list(parts), tuple(wanted)
        self.steps, self.backend = steps, backend

    @property
    def loss(self) -> dict[str, NDArray[np.float32]]:
        """By split, ``[replicas, measured]``; nan after a replica's end."""
        return self._by_split("loss", slice(None, -1))

    @property
    def accuracy(self) -> dict[str, NDArray[np.float32]]:
        """By split, ``[replicas, measured]``, from 0 to 1; nan after a replica's end, or without classes."""
        return self._by_split("accuracy", slice(None, -1))

    @property
    def end_loss(self) -> dict[str, NDArray[np.float32]]:
        """By split, ``[replicas]``: at the last step of each."""
        return self._by_split("loss", -1)

    @property
    def end_accuracy(self) -> dict[str, NDArray[np.float32]]:
        """By split, ``[replicas]``: at the last step of each."""
        return self._by_split("accuracy", -1)

    @property
    def batch_loss(self) -> NDArray[np.float32]:
        """``[replicas, measured]``: mean loss of the batches since the measurement before."""
        return self._field("batch_loss")

    @property
    def nodes(self) -> NDArray[np.uint8]:
        """``[replicas, measured, hidden]``: 1 true dummy, 2 pseudo dummy, 0 neither; 255 after the end."""
        return self._field("nodes")[:, :-1]

    @property
    def end_nodes(self) -> NDArray[np.uint8]:
        """``[replicas, hidden units]``: at the last step of each."""
        return self._field("nodes")[:, -1]

    @property
    def parameters(self) -> NDArray[np.float32]:
        """``[replicas, measured, parameters]``; nan after the end."""
        return self._field("parameters")

    @property
    def batch_sizes(self) -> NDArray[np.int32]:
        """``[replicas, measured, parameters]``: of the step that follows; -1 where none does."""
        return self._field("batch_sizes")

    @property
    def gradients(self) -> NDArray[np.float32]:
        """``[replicas, measured]``: mean absolute gradient of the step that follows; nan where none does."""
        return self._field("gradients")[..., 0]

    @property
    def signs(self) -> NDArray[np.float32]:
        """``[replicas, measured]``: share of parameters whose gradient has the sign of the step before."""
        return self._field("gradients")[..., 1]

    @property
    def final(self) -> NDArray[np.float32]:
        """``[replicas, parameters]``: at the end."""
        return self._field("final")

    @property
    def first_under(self) -> NDArray[np.int64]:
        """``[replicas]``: the first step with a training loss under `Record.under`, or -1."""
        return self._field("first_under")

    @property
    def stopped_at(self) -> NDArray[np.int64]:
        """``[replicas]``: how many steps each took."""
        return self._field("stopped_at")

    @property
    def status(self) -> NDArray[np.str_]:
        """``[replicas]``: "done", "stopped" or "diverged" (the loss of a batch was not finite)."""
        return self._field("status")

    @property
    def seconds(self) -> NDArray[np.float64]:
        """``[replicas]``: what each took of one thread."""
        return self._field("seconds")

    def __len__(self) -> int:
        return len(self.status)

    def __repr__(self) -> str:
        return (
            f"<Result of {len(self)} replicas, measured after {self.steps.tolist()[:8]} ... steps>"
        )

    def _by_split(self, name: str, places: Any) -> dict[str, NDArray[np.float32]]:
        values = self._field(name)
        return {split: values[:, SPLITS.index(split), places] for split in self._wanted}

    def _field(self, name: str) -> NDArray[Any]:
        values = []
        for part, rows in self._parts:
            if isinstance(part, Path):
                with np.load(part) as fields:
                    value = fields.get(name)
            else:
                value = part.get(name)
            if value is None:
                raise TruestepError(
                    f"This ensemble has no record of {name}. Ask for it: "
                    f"train(..., record=Record({name}=True))."
                )
            values.append(value[rows])
        return np.concatenate(values)
