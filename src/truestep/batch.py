"""The batch that a step is about: this process's records, or those of all ranks together."""

from collections.abc import Container, Iterable, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from truestep.activity import Activity
from truestep.arrived import Arrived
from truestep.distributed import Ranks, find_ranks, like, ranks_of
from truestep.exchange import Exchange, Share
from truestep.record import Record
from truestep.records import Records

__all__ = ["Batch"]


class Batch:
    """Joins the records of the ranks that train one model.

    Args:
        model: the counter's model.
        records: this process's.
        process_group: the ranks that add up gradients by hand, if any.

    Attributes:
        override: this process's N, where it is set instead of counted.
    """

    def __init__(
        self,
        model: nn.Module,
        records: Records,
        process_group: Any,
    ) -> None:
        self._records = records
        self.override: int | None = None
        self._exchange: Exchange | None = None
        self._ranks: Ranks | None = None
        self._join(find_ranks(model, process_group))

    def size(self) -> int:
        """This process's N: of the records of present gradients, or, without any, of the last ones."""
        if self.override is not None:
            return self.override
        committed = self._records.committed
        found = [(p.grad, committed.get(id(p))) for p in self._records.names]
        living = [(int(r.batch_size), g, r) for g, r in found if g is not None and r and r.is_of(g)]
        for size, gradient, record in sorted(living, key=itemgetter(0), reverse=True):
            if not record.was_zeroed(gradient):
                return size
        return max((int(record.batch_size) for record in committed.values()), default=0)

    def size_of(self, record: Record) -> int | Tensor:
        """This process's N of a record."""
        return record.batch_size if self.override is None else self.override

    def new_wrapper(self) -> nn.Module | None:
        """The DistributedDataParallel module that is calling the model, when it does so first."""
        if self._ranks is not None:
            return None
        wrapper = nn.parallel.DistributedDataParallel._active_ddp_module  # noqa: SLF001
        if wrapper is None or self._records.names.keys().isdisjoint(wrapper.parameters()):
            return None
        self._join(ranks_of(wrapper))
        return wrapper

    def prepare(self, parameters: Iterable[Tensor]) -> None:
        """Lets the ranks agree on what a step uses: the parameters whose gradients are not corrected."""
        if self._ranks is None:
            return
        found = {p: self._records.of(p) for p in parameters if p.grad is not None}
        wanted = {p for p, record in found.items() if record is None or not record.corrected}
        self._exchange = Exchange(self._ranks, self._shares(wanted), strict=True)

    def release(self) -> None:
        """Ends what `prepare` began."""
        self._exchange = None

    def covers(self, parameter: Tensor) -> bool:
        """Whether a step was prepared that uses this parameter, or none needs to be."""
        exchange = self._exchange
        return self._ranks is None or (exchange is not None and parameter in exchange.counted)

    def find(self, parameter: Tensor) -> tuple[Activity, int | Tensor] | None:
        """The samples that reach a parameter, and N; None if its gradient is corrected already.

        Raises:
            TruestepError: no sample was counted.
        """
        exchange = self._exchange
        counted = exchange is not None and parameter in exchange.counted
        if exchange is not None and counted:
            # A rank that left the parameter unused has its gradient from the others.
            self._records.adopt(parameter, exchange.own_batch_size(parameter))
        record = self._records.find(parameter)
        if record.corrected:
            return None
        if exchange is not None and counted:
            return exchange.take(parameter)
        return record.activity, self.size_of(record)

    def find_all(
        self, parameters: Sequence[Tensor]
    ) -> Iterable[tuple[Activity, int | Tensor] | None]:
        """`find` of each of several parameters; what it refuses is refused before the first is found."""
        records, size, exchange = self._records, self.override, self._exchange
        if exchange is not None:
            # A rank may have no record of its own of what others have counted.
            records.find_all(
                [p for p in parameters if p not in exchange.counted or records.of(p) is not None]
            )
            return map(self.find, parameters)
        return [
            None
            if record.corrected
            else (record.activity, record.batch_size if size is None else size)
            for record in records.find_all(parameters)
        ]

    def arrived(self) -> Arrived | None:
        """What a step of this process alone may take instead of each parameter's `find`."""
        found = self._records.arrived
        return None if found is None or found.corrected or self._ranks is not None else found

    def counts(self, *, reduce: bool) -> dict[str, Tensor]:
        """Parameter name to counts, of this process or of all ranks."""
        names = self._records.names
        if not reduce or self._ranks is None:
            found = {name: self._records.of(p) for p, name in names.items()}
            return {name: r.activity.count() for name, r in found.items() if r is not None}
        exchange = Exchange(self._ranks, self._shares(names), strict=False)
        return {
            name: like(p, exchange.take(p)[0].count().long())
            for p, name in names.items()
            if p in exchange.counted
        }

    def statistics(self, eps: float) -> dict[str, dict[str, float]]:
        """Parameter name to what is worth logging, of this process."""
        found = {}
        for parameter, name in self._records.names.items():
            record = self._records.of(parameter)
            if record is None:
                continue
            counts = record.activity.count().double()
            if not counts.numel():
                continue
            size = float(self.size_of(record))
            reached = counts[counts > 0]
            found[name] = {
                "batch_size": size,
                "smallest": counts.min().item(),
                "mean": counts.mean().item(),
                "largest": counts.max().item(),
                "unreached": 1 - reached.numel() / counts.numel(),
                "largest_factor": size / (reached.min().item() + eps) if reached.numel() else 1.0,
            }
        return found

    def _join(self, ranks: Ranks | None) -> None:
        self._ranks = ranks
        # DistributedDataParallel may put its own memory in the place of a gradient.
        self._records.follows = ranks is not None

    def _shares(self, wanted: Container[Tensor]) -> list[Share]:
        """What this rank knows about each parameter."""
        found = {p: self._records.of(p) for p in self._records.names}
        sizes = {p: int(self.size_of(record)) for p, record in found.items() if record is not None}
        # A rank that left a parameter unused has still put its samples into the loss's denominator.
        usual = self.size()
        shares = []
        for parameter, name in self._records.names.items():
            record = found[parameter]
            activity = None if record is None else record.activity
            size = sizes.get(parameter, usual)
            shares.append(Share(name, parameter, parameter in wanted, activity, size))
        return shares
