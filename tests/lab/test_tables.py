import math

import pytest
from rich.console import Console
from synthetic import make_race, make_result

from truestep.lab.statistics import choose, summarise
from truestep.lab.tables import columns, sorted_rows, table, with_interval

SEVEN = ("sgd", "momentum", "adagrad", "adam", "dasgd", "asgd", "asgd+dasgd")
TARGET = ("accuracy", 0.64)


def summary_of(results, **options):
    return summarise(results, choose(results), **{"target": TARGET} | options)


def printed(summary):
    console = Console(width=80, record=True, file=None, legacy_windows=False, quiet=True)
    with console.capture() as capture:
        console.quiet = False
        console.print(table(summary))
    return capture.get()


def diverged(optimizer, **more):
    return make_result(optimizer, 0.1, losses=(math.nan,), status="diverged", **more)


@pytest.mark.parametrize(
    ("half", "text"),
    [
        (0.0012, "0.9877 ± 0.0012"),
        (0.0136, "0.988 ± 0.014"),
        (0.00034, "0.9877 ± 0.0003"),
        (0.000034, "0.98765 ± 0.00003"),
        (0.4, "0.99 ± 0.40"),
        (12.0, "1 ± 12"),
        (123.0, "1 ± 123"),
        (0.0, "0.9877 ± 0"),
        (math.nan, "0.9877"),
    ],
)
def test_a_mean_is_as_precise_as_its_interval(half, text):
    assert with_interval(0.98765, 0.98765 - half, 0.98765 + half) == text


def test_rows_are_by_batch_size_and_test_loss_with_the_lost_last():
    results = [*make_race(("sgd", "adam", "asgd"), (64, 256)), diverged("dasgd", batch_size=64)]
    rows = sorted_rows(summary_of(results))
    assert [row["batch_size"] for row in rows] == [64] * 4 + [256] * 3
    assert [row["optimizer"] for row in rows[:4]] == ["adam", "asgd", "sgd", "dasgd"]
    assert rows[0]["test_loss"] < rows[1]["test_loss"] < rows[2]["test_loss"]


@pytest.mark.parametrize("sizes", [(64,), (64, 256, 1024, 4096)])
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_terminal_table_fits_80_columns_without_cutting(sizes, seeds):
    summary = summary_of(make_race(SEVEN, sizes, seeds))
    lines = printed(summary).splitlines()
    assert max(len(line) for line in lines) <= 80
    text = "\n".join(lines)
    assert "…" not in text
    for row in summary.reset_index().to_dict("records"):
        # Whole on one line: the name, the learning rate and the loss with its interval.
        loss = with_interval(row["test_loss"], row["test_loss_low"], row["test_loss_high"])
        assert [line for line in lines if line.startswith(row["optimizer"] + " ") and loss in line]
    assert ("one seed" in text) == (seeds == 1)
    assert ("batch 4096" in text) == (len(sizes) > 1)


def test_the_terminal_table_says_what_was_lost():
    results = [*make_race(), diverged("a.module:Mine")]
    summary = summary_of(results)
    summary.loc[("asgd", 64), "diverged_seeds"] = 2
    text = printed(summary)
    assert "2 of 3 diverged" in text
    (mine,) = [line for line in text.splitlines() if line.startswith("Mine")]
    assert "diverged" in mine
    assert "nan" not in text


def test_differences_that_leave_out_zero_are_marked_in_plain_text_too():
    summary = summary_of(make_race(("sgd", "adam", "asgd")))
    summary.loc[("asgd", 64), "test_loss_difference_high"] = 0.001
    lines = printed(summary).splitlines()
    marked = {line.split()[0] for line in lines if "†" in line and "±" in line}
    assert "adam" in marked
    assert "asgd" not in marked
    assert "† the interval leaves out 0" in " ".join(" ".join(lines).split())


def test_a_learning_rate_at_the_edge_has_a_star_and_its_meaning():
    text = printed(summary_of(make_race(grid=(0.0, 0.5))))
    assert "0.001*" in text or "0.004*" in text
    assert "a better one may lie beyond" in text
    inside = make_race(("sgd",))
    assert not choose(inside)["at_edge"].any()
    assert "*" not in printed(summary_of(inside))


def test_without_the_baseline_there_is_no_difference():
    results = make_race(("adam", "asgd"))
    assert "minus" not in printed(summary_of(results))
    heads = [column.head for column in columns(summary_of(results), TARGET)]
    assert not [head for head in heads if "sgd's" in head]


def test_the_reports_columns_have_text_and_order_for_every_row():
    summary = summary_of([*make_race(SEVEN, (64, 256)), diverged("nesterov", batch_size=64)])
    shown = {column.head: column for column in columns(summary, TARGET)}
    assert list(shown) == [
        "optimizer",
        "batch size",
        "learning rate",
        "test loss",
        "test accuracy",
        "loss minus sgd's",
        "accuracy minus sgd's",
        "epochs to accuracy ≥ 0.64",
        "seconds to accuracy ≥ 0.64",
        "ms per step (over sgd's)",
        "memory, bytes per parameter",
        "diverged in grid, %",
    ]
    rows = sorted_rows(summary)
    for column in shown.values():
        for row in rows:
            assert column.text(row)
            assert "nan" not in column.text(row)
            assert isinstance(column.value(row), str | float | int)
            assert column.explanation
    (lost,) = [row for row in rows if row["optimizer"] == "nesterov"]
    assert shown["test loss"].text(lost) == "diverged"
    assert shown["diverged in grid, %"].text(lost) == "100"


def row_of(summary, optimizer):
    (row,) = [row for row in sorted_rows(summary) if row["optimizer"] == optimizer]
    return row


def test_verdicts_need_an_interval_that_leaves_out_zero():
    summary = summary_of(make_race(("sgd", "adam", "asgd")))
    shown = {column.head: column for column in columns(summary, TARGET)}
    loss, accuracy = shown["loss minus sgd's"], shown["accuracy minus sgd's"]
    adam = row_of(summary, "adam")
    assert (loss.verdict(adam), accuracy.verdict(adam)) == ("better", "better")
    summary.loc[("adam", 64), "test_loss_difference_high"] = 0.001
    assert loss.verdict(row_of(summary, "adam")) == ""
    other = summary_of(make_race(("sgd", "adam")), baseline="adam")
    shown = {column.head: column for column in columns(other, TARGET)}
    sgd = row_of(other, "sgd")
    assert shown["loss minus adam's"].verdict(sgd) == "worse"
    assert shown["accuracy minus adam's"].verdict(sgd) == "worse"
    assert shown["loss minus adam's"].verdict(row_of(other, "adam")) == ""


def test_reaching_the_target_tells_how_many_did():
    results = [
        make_result(seed=seed, final=final, losses=losses)
        for final in (False, True)
        for seed, losses in enumerate([(2.0, 1.0), (1.0, 0.5), (2.0, 2.0)])
    ]

    def epochs(target):
        summary = summary_of(results, target=target)
        (column,) = [c for c in columns(summary, target) if c.head.startswith("epochs")]
        return column.text(row_of(summary, "sgd"))

    assert epochs(("loss", 2.5)) == "1"
    assert epochs(("loss", 1.0)) == "2 (2 of 3)"
    assert epochs(("loss", 0.7)) == "1 of 3"
    assert epochs(("loss", 0.1)) == "never"
