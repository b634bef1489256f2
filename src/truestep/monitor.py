"""What `SampleCounter.statistics()` says, in other forms: scalars for a logger, a table for a reader."""

from collections.abc import Mapping

from truestep.checks import check_kind

__all__ = ["scalars", "table"]

Statistics = Mapping[str, Mapping[str, float]]


def scalars(statistics: Statistics) -> dict[str, float]:
    """One flat dict, as loggers take it.

    For TensorBoard, call ``writer.add_scalar(tag, value, step)`` for each of its items: quantities
    become sections with a chart for each parameter.

    Args:
        statistics: of `SampleCounter.statistics`.

    Returns:
        "quantity/parameter" to value.

    Example:
        >>> import torch, truestep
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> counter = truestep.SampleCounter(model)
        >>> model(torch.tensor([[1.0, 0.0], [2.0, 3.0]])).sum().backward()
        >>> truestep.monitor.scalars(counter.statistics())["largest_factor/weight"]
        1.0
    """
    check_kind(statistics, Mapping, "statistics", "counter.statistics()")
    return {
        f"{quantity}/{parameter}": value
        for parameter, quantities in statistics.items()
        for quantity, value in quantities.items()
    }


def table(statistics: Statistics, rows: int = 20) -> str:
    """The parameters with the largest factors N / (m + eps), one on each line, largest first.

    Args:
        statistics: of `SampleCounter.statistics`.
        rows: how many parameters to show.

    Returns:
        Lines of text; the heads of the columns are the keys of `statistics`.

    Example:
        >>> import torch, truestep
        >>> model = torch.nn.Linear(2, 1)
        >>> counter = truestep.SampleCounter(model)
        >>> model(torch.tensor([[1.0, 0.0], [2.0, 0.0], [2.0, 3.0]])).sum().backward()
        >>> print(truestep.monitor.table(counter.statistics()))
        parameter  largest_factor  batch_size  smallest  mean  largest  unreached
        weight                1.5           3         1     2        3          0
        bias                 0.75           3         3     3        3          0
    """
    check_kind(statistics, Mapping, "statistics", "counter.statistics()")
    ranked = sorted(statistics.items(), key=lambda item: -item[1]["largest_factor"])[:rows]
    quantities = ("largest_factor", "batch_size", "smallest", "mean", "largest", "unreached")
    head = ("parameter", *quantities)
    lines = [head, *((name, *(f"{s[q]:.4g}" for q in quantities)) for name, s in ranked)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [name.ljust(widths[0]), *(v.rjust(w) for v, w in zip(values, widths[1:], strict=True))]
        )
        for name, *values in lines
    )
