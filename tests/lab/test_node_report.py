import io

import pandas as pd
import torch
from rich.console import Console
from torch import nn

from planting import plant
from truestep import compress, find_dummy_nodes
from truestep.lab import node_report
from truestep.nodes import DummyNodes


def found():
    model = nn.Sequential(
        plant(nn.Linear(3, 8), {1: "true", 2: "pseudo", 3: "constant"}), nn.ReLU(), nn.Linear(8, 2)
    )
    x = torch.randn(300, 3).clamp(-3, 3)
    return model, x, find_dummy_nodes(model, [x])


def test_the_frames_hold_what_was_found():
    _, _, nodes = found()
    frame, units = node_report.node_frame(nodes), node_report.unit_frame(nodes)
    row = frame.iloc[0]
    assert (row["layer"], row["units"]) == ("0", 8)
    for kind in ("true", "constant", "pseudo"):
        assert row[kind] == (units["kind"] == kind).sum() >= 1
    assert units["kind"].tolist() == nodes["0"].kinds()
    assert len(node_report.node_frame(DummyNodes([], 0))) == 0


def test_the_history_is_indexed_by_label_and_layer():
    frame = node_report.history_frame([{"label": 1, "layer": "0", "true": 3}])
    assert frame.loc[(1, "0"), "true"] == 3


def test_tables_print_in_eighty_columns():
    model, x, nodes = found()
    _, report = compress(model, nodes, x)
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    for table in [node_report.node_table(nodes), *node_report.compression_tables(report)]:
        console.print(table)
    text = stream.getvalue()
    assert "folded into the next bias" in text
    assert max(map(len, text.splitlines())) <= 80


def test_names_of_any_length_are_whole():
    name = "encoder_of_the_left_branch_downsample_projection_in"
    model = nn.Sequential()
    model.add_module(name, plant(nn.Linear(3, 8), {1: "true", 2: "pseudo"}))
    model.add_module("relu", nn.ReLU())
    model.add_module("out", nn.Linear(8, 2))
    x = torch.randn(300, 3).clamp(-3, 3)
    nodes = find_dummy_nodes(model, [x])
    _, report = compress(model, nodes, x)
    for table in [node_report.node_table(nodes), *node_report.compression_tables(report)[1:]]:
        stream = io.StringIO()
        Console(file=stream, width=60).print(table)
        first = "".join(line[:30].split("  ")[0].strip() for line in stream.getvalue().splitlines())
        assert name in first


def test_the_heat_map_has_a_row_for_each_layer_and_a_colour_for_each_kind():
    _, _, nodes = found()
    figure = node_report.heat_map(node_report.unit_frame(nodes))
    (axes,) = figure.axes
    image = axes.images[0].get_array()
    assert image.shape == (1, 8)
    kinds = nodes["0"].kinds()
    assert image[0][1] != image[0][2] != image[0][3]
    assert kinds[1:4] == ["true", "pseudo", "constant"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"true", "pseudo", "constant"} <= set(names)
    node_report.heat_map(pd.DataFrame()).savefig(io.BytesIO())
