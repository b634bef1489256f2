import math
from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from synthetic import FIELD, make_race, make_result, make_run

from truestep.lab import figures
from truestep.lab.panels import KNOWN, SPARE, styles
from truestep.lab.statistics import (
    at_reference,
    choose,
    landscape,
    learning_curves,
    summarise,
)

SEVEN = ("sgd", "momentum", "adagrad", "adam", "dasgd", "asgd", "asgd+dasgd")
SIZES = (64, 256, 1024, 4096)
TARGET = ("loss", 1.15)


@pytest.fixture(scope="module")
def small():
    return make_race(SEVEN, scale=0.1)


@pytest.fixture(scope="module")
def large():
    return make_race(SEVEN, SIZES, seeds=3, reference=256, samples=60_000)


def draw_all(results):
    """Every figure of a race by name."""
    chosen = choose(results)
    summary = summarise(results, chosen, target=TARGET)
    drawn = {
        "learning rates": figures.learning_rates(landscape(results), chosen),
        "loss": figures.curves(learning_curves(results, chosen, "loss"), "loss"),
        "accuracy": figures.curves(learning_curves(results, chosen, "accuracy"), "accuracy", 0.6),
    }
    if len(set(chosen.index.get_level_values("batch_size"))) > 1:
        drawn["steps"] = figures.steps_to_target(summary)
        fixed = summarise(results, at_reference(chosen, 256))
        drawn["batch sizes"] = figures.batch_sizes(summary, fixed, 256)
    return drawn


@pytest.fixture(scope="module")
def drawn(small, large):
    """Every figure of a small and of a large race; drawing is what takes the time."""
    return {
        (race, name): figure
        for race, results in {"small": small, "large": large}.items()
        for name, figure in draw_all(results).items()
    }


@pytest.fixture(scope="module")
def texts(drawn):
    return {name: drawn_texts(figure) for name, figure in drawn.items()}


def panel(figure, name, column=0):
    """The visible axes of an optimizer, found by its title as a reader finds it."""
    shown = [axes for axes in figure.axes if axes.get_visible()]
    rows = [
        axes
        for axes in shown
        if axes.get_title("left") == name or name in [text.get_text() for text in axes.texts]
    ]
    (last,) = rows
    row = last.get_subplotspec().rowspan
    in_row = [axes for axes in shown if axes.get_subplotspec().rowspan == row]
    return in_row[column] if last.texts else last


def bold(axes):
    """The optimizer's own line."""
    (line,) = [line for line in axes.lines if line.get_linewidth() == 1.8]
    return line


def crosses(axes):
    return [float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "x"]


def drawn_texts(figure):
    """Text and extent of everything legible in the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    found = [child for part in (*figure.texts, *figure.legends) for child in part.findobj(Text)]
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        found += [axes.title, axes._left_title, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            found += [tick.label1 for tick in axis._update_ticks() if tick.label1.get_visible()]
    return [(t.get_text(), t.get_window_extent(renderer)) for t in found if t.get_text()]


def test_no_label_touches_another_or_the_border(drawn, texts):
    for name, figure in drawn.items():
        frame = figure.bbox
        assert len(texts[name]) > 20, name
        for (text, box), (other, other_box) in combinations(texts[name], 2):
            assert not box.overlaps(other_box), (name, text, other)
            assert frame.x0 <= box.x0 <= box.x1 <= frame.x1, (name, text)
            assert frame.y0 <= box.y0 <= box.y1 <= frame.y1, (name, text)


def test_numbers_are_written_out(texts):
    for name, found in texts.items():
        labels = [text for text, _ in found]
        assert not [label for label in labels if "$" in label or "e-" in label], name
        assert any(label.replace(".", "").isdigit() for label in labels), name


def test_every_optimizer_has_its_panel_and_its_colour(drawn):
    for (race, _), figure in drawn.items():
        for name in SEVEN if race == "small" else ():
            assert to_rgb(bold(panel(figure, name)).get_color()) == to_rgb(KNOWN[name].colour)


def test_with_several_batch_sizes_each_has_a_column(large, drawn):
    figure = drawn["large", "learning rates"]
    assert len([axes for axes in figure.axes if axes.get_visible()]) == 28
    table = landscape(large)
    for column, size in enumerate(SIZES):
        line = bold(panel(figure, "asgd", column))
        expected = table.loc[("asgd", size), "loss"].replace(math.inf, math.nan)
        assert line.get_xdata().tolist() == expected.index.tolist()
        assert line.get_ydata().tolist() == pytest.approx(expected.tolist(), nan_ok=True)


def test_the_choice_is_ringed_and_the_good_band_marked(small, drawn):
    chosen = choose(small)
    figure = drawn["small", "learning rates"]
    for name in SEVEN:
        axes = panel(figure, name)
        choice = chosen.loc[(name, 64)]
        (ring,) = [line for line in axes.lines if line.get_markersize() == 9]
        assert ring.get_xydata().tolist() == [[choice["lr"], pytest.approx(choice["loss"])]]
        (band,) = axes.patches
        left, right = band.get_x(), band.get_x() + band.get_width()
        assert left < choice["good_low"] <= choice["good_high"] < right
        grid = choice["grid"]
        inside = [lr for lr in grid if left < lr < right]
        assert inside == [lr for lr in grid if choice["good_low"] <= lr <= choice["good_high"]]


def test_diverged_learning_rates_are_crossed(small, drawn, texts):
    table = landscape(small)
    figure = drawn["small", "learning rates"]
    for name in SEVEN:
        lost = table.loc[(name, 64)].query("diverged > 0").index.tolist()
        assert lost, "the race must have diverged runs"
        assert crosses(panel(figure, name)) == lost
    assert "a seed diverged" in [text for text, _ in texts["small", "learning rates"]]


def test_an_optimizer_that_always_diverged_keeps_an_empty_panel(small):
    lost = [make_result("nesterov", lr, losses=(math.nan,), status="diverged") for lr in (0.1, 1.0)]
    results = small + lost
    figure = figures.learning_rates(landscape(results), choose(results))
    axes = panel(figure, "nesterov")
    assert crosses(axes) == [0.1, 1.0]
    assert not axes.patches


def test_steps_are_medians_with_a_line_of_perfect_scaling(large, drawn):
    figure = drawn["large", "steps"]
    summary = summarise(large, choose(large), target=TARGET)
    steps = summary.loc["asgd", "step_to_target"]
    axes = panel(figure, "asgd")
    assert bold(axes).get_ydata().tolist() == steps.tolist()
    (perfect,) = [line for line in axes.lines if line.get_linewidth() == 0.9]
    assert perfect.get_ydata()[-1] == pytest.approx(steps.loc[64] / 64)
    assert crosses(axes) == []
    assert crosses(panel(figure, "sgd")) == [
        size for size, step in summary.loc["sgd", "step_to_target"].items() if math.isinf(step)
    ]
    assert crosses(panel(figure, "sgd")), "the race must have targets not reached"


def test_a_target_that_nobody_reaches_leaves_steps_that_can_be(large):
    summary = summarise(large, choose(large), target=("loss", -1.0))
    assert summary["step_to_target"].map(math.isinf).all()
    low, high = panel(figures.steps_to_target(summary), "sgd").get_ylim()
    assert 0 < low < 1
    assert high > 10


def test_batch_sizes_show_both_ways_of_tuning(large):
    chosen = choose(large)
    own, fixed = summarise(large, chosen), summarise(large, at_reference(chosen, 256))
    figure = figures.batch_sizes(own, fixed, 256)
    axes = panel(figure, "sgd")
    assert bold(axes).get_ydata().tolist() == own.loc["sgd", "test_loss"].tolist()
    (thin,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert thin.get_linewidth() < bold(axes).get_linewidth()
    assert thin.get_ydata()[1] == bold(axes).get_ydata()[1]
    assert thin.get_ydata()[3] > bold(axes).get_ydata()[3]
    assert {"64", "256", "1024", "4096"} <= {text for text, _ in drawn_texts(figure)}


def test_a_seed_that_diverged_breaks_the_line_of_batch_sizes(large):
    chosen = choose(large)
    own, fixed = summarise(large, chosen), summarise(large, at_reference(chosen, 256))
    fixed.loc[("asgd", 64), "diverged_seeds"] = 1
    figure = figures.batch_sizes(own, fixed, 256)
    axes = panel(figure, "asgd")
    (thin,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [math.isnan(loss) for loss in thin.get_ydata()] == [True, False, False, False]
    assert crosses(axes) == [64]
    assert crosses(panel(figure, "sgd")) == []


def test_one_seed_and_one_learning_rate_draw(recwarn):
    results = [
        make_run("sgd", 1.0, 64, 0, final=False),
        make_run("sgd", 1.0, 64, 0, final=True),
    ]
    for figure in draw_all(results).values():
        assert len(drawn_texts(figure)) > 5
    assert not recwarn.list


def test_long_and_imported_names_fit():
    names = [
        "my.long.module.path:ThisIsAnOptimizerWithAnUnreasonablyLongName",
        "asgd+dasgd+momentum",
    ]
    results = [
        make_result(name, lr, batch_size, losses=(3.0, lr + 1))
        for name in names
        for lr in (0.1, 0.3, 1.0)
        for batch_size in (64, 128)
    ]
    figure = figures.learning_rates(landscape(results), choose(results))
    texts = drawn_texts(figure)
    assert any("ThisIsAnOptimizer" in text for text, _ in texts)
    for _, box in texts:
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1


def test_looks_are_fixed_by_name_and_tell_all_apart():
    assert styles(["adam"])["adam"] == styles(FIELD)["adam"] == KNOWN["adam"]
    colours = [style.colour for style in (*KNOWN.values(), *SPARE)]
    assert len(set(colours)) == len(colours)
    names = [*KNOWN, *(f"mine:{letter}" for letter in "ABCDEF")]
    looks = styles(reversed(names))
    assert list(looks) == names
    assert len(set(looks.values())) == len(names)


@pytest.mark.parametrize(("metric", "target"), [("loss", 0.5), ("loss", 0.01), ("accuracy", 0.99)])
def test_a_target_is_in_view_however_far_off(small, metric, target):
    table = learning_curves(small, choose(small), metric)
    axes = panel(figures.curves(table, metric, target), "sgd")
    assert [line for line in axes.lines if set(line.get_ydata()) == {target}]
    low, high = axes.get_ylim()
    assert low < target < high
    assert low < bold(axes).get_ydata().min() < bold(axes).get_ydata().max() < high


def test_intervals_do_not_stretch_an_axis_beyond_reason():
    # Two seeds that differ: their interval is a dozen times as wide as their distance.
    results = [
        make_result(name, lr, seed=seed, losses=(loss + seed,))
        for name, loss in [("sgd", 2.0), ("adam", 3.0)]
        for lr in (0.1, 1.0)
        for seed in range(2)
    ]
    figure = figures.learning_rates(landscape(results), choose(results))
    low, high = panel(figure, "sgd").get_ylim()
    means = bold(panel(figure, "adam")).get_ydata()
    assert 0 < low < 2.5
    assert max(means) < high < 5


def test_the_last_row_of_panels_is_not_a_lonely_one():
    for count, rows in [(4, [4]), (5, [3, 2]), (6, [3, 3]), (7, [4, 3]), (9, [3, 3, 3])]:
        results = [make_result(f"m:{n}", lr) for n in range(count) for lr in (0.1, 1.0)]
        figure = figures.learning_rates(landscape(results), choose(results))
        shown = [axes.get_subplotspec() for axes in figure.axes if axes.get_visible()]
        assert [sum(s.rowspan.start == row for s in shown) for row in range(len(rows))] == rows
