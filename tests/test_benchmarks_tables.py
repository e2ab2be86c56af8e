"""Tables: of several measurements of one subject the latest of each part, with its commit, and nothing of another setting."""

from typing import Any

import pytest

from benchmarks import markup, merge, plot, tables
from benchmarks.cases import Shape
from benchmarks.layer import CUDA_SHAPES

SMALL = Shape(24, 6, 7, 5)
LAYER: dict[str, Any] = {
    "what": "layer", "shape": SMALL.key(), "contestant": "a", "device": "cpu", "dtype": "float32", "ours": True,
}  # fmt: skip
HERE = {"device_name": "here", "threads": 2, "torch": "2.13", "allocator": "keep"}


def test_absent_rivals_stand_below_the_table() -> None:
    row = {"what": "layer", "shape": SMALL.key(), "device": "cpu", "dtype": "float32"}
    found = [{**row, "contestant": "here", "forward_ms": 1.0}, {**row, "contestant": "gone", "absent": "no module (pip)"}]
    text = tables.forward(found)
    assert "gone is absent: no module (pip)." in text
    assert "| gone" not in text


def test_latest_row_wins() -> None:
    row = {"what": "layer", "shape": SMALL.key(), "contestant": "a", "device": "cpu"}
    merged = tables.latest([{**row, "forward_ms": 1, "step_ms": 5}, {**row, "forward_ms": 2}], what="layer")
    assert merged == [{**row, "forward_ms": 2, "step_ms": 5}]


def test_a_newer_row_leaves_nothing_older_of_its_parts() -> None:
    row = {"what": "layer", "shape": SMALL.key(), "contestant": "a", "device": "cpu"}
    old = {
        **row, "forward_ms": 1, "forward_graph_ms": 0.5, "forward_memory_failed": "error", "step_ms": 5, "error": 1e-7,
        "commit": "old",
    }  # fmt: skip
    kept = {"forward_memory_failed": "error", "step_ms": 5, "error": 1e-7}
    then = {"error": "old", "forward": "old", "memory": "old", "step": "old"}
    for new, expected, commits in (
        ({"forward_ms": 2}, {**kept, "forward_ms": 2}, {**then, "forward": "new"}),
        ({"forward_failed": "error"}, {**kept, "forward_failed": "error"}, {**then, "forward": "new"}),
        ({"forward_memory_mib": 3}, {**old, "forward_memory_mib": 3}, {**then, "memory": "new"}),
        ({"error": 2e-7}, {**old, "error": 2e-7}, {**then, "error": "new"}),
        ({"failed": "wrong"}, {"failed": "wrong"}, {}),
        ({"absent": "not installed"}, {**old, "absent": "not installed"}, then),
    ):
        if "forward_memory_mib" in new:
            expected = {key: value for key, value in expected.items() if key != "forward_memory_failed"}
        (found,) = tables.latest([old, {**row, **new, "commit": "new"}], what="layer")
        assert found == {**row, **expected, "commit": "new", "commits": commits}
    assert tables.latest([{**row, "failed": "wrong"}, {**row, "step_ms": 1}], what="layer") == [{**row, "step_ms": 1}]


def test_a_table_names_the_commits_of_what_it_shows() -> None:
    row = {**LAYER, **HERE}
    found = [
        {**row, "forward_ms": 1.0, "step_ms": 5.0, "error": 1e-7, "commit": "first"},
        {**row, "step_ms": 4.0, "commit": "second"},
        {**row, "step_memory_mib": 4.0, "forward_memory_mib": 1.0, "commit": "third"},
    ]
    for name, commit in (("forward", "first"), ("step", "second"), ("memory", "third"), ("accuracy", "first")):
        assert f"; commit {commit}." in tables.TABLES[name](found)
    assert merge.commits(tables.latest(found), ("forward", "memory")) == ["first", "third"]
    bar = {**HERE, "what": "bars", "shape": SMALL.key(), "device": "cpu", "forward_bar": None, "step_bar": None}
    both = [{**bar, f"{phase}_ms": 1.0, f"{phase}_ratio": 1.0, "commit": phase} for phase in ("forward", "step")]
    assert "commit forward, step." in tables.bars(both)


@pytest.mark.parametrize(
    ("key", "other"), [("threads", 1), ("torch", "2.14"), ("device_name", "there"), ("allocator", "default")]
)
def test_rows_of_another_setting_stand_by_themselves(key: str, other: Any) -> None:
    another = Shape(8, 4, 4, 5)
    row = {**LAYER, **HERE, "note": ""}
    found = [
        {**row, "step_ms": 5.0}, {**row, "shape": another.key(), "step_ms": 6.0}, {**row, key: other, "step_ms": 7.0},
    ]  # fmt: skip
    lines = [line for line in tables.step(found).splitlines() if line.startswith("| a")]
    ours, others = (dict(markup.FACTS)[key].format(value) for value in (HERE[key], other))
    assert lines == [f"| a; {ours} | 5 ms | 6 ms |", f"| a; {others} | 7 ms | - |"]
    network = {
        **HERE, "what": "network", "device": "cpu", "kan": [2, 1], "mlp": [2, 1], "batch": 1, "forward_ms": 1.0,
        "forward_ratio": 1.0,
    }  # fmt: skip
    text = tables.network([network, {**network, key: other, "forward_ms": 3.0}])
    assert f"| KAN([2, 1]); {ours} |" in text and f"| KAN([2, 1]); {others} |" in text


def gpu_rows() -> list[merge.Row]:
    row = {
        **LAYER, **HERE, "device": "cuda", "shape": CUDA_SHAPES[0].key(), "contestant": "kan_fast native", "commit": "now",
    }  # fmt: skip
    rival = {**row, "ours": False, "same_function": True}
    times = {f"{phase}_ms": 1.0 for phase in merge.PHASES} | {"forward_ratio": 1.0, "step_ratio": 1.0, "error": 1e-7}
    return [
        {**row, **times, "step_fastest_rival": "efficient-kan", "step_ratio_to_fastest_rival": 0.25},
        {**row, "contestant": "kan_fast triton", "failed": "wrong: error 1"},
        {**rival, "contestant": "efficient-kan", "step_ms": 4.0, "optimiser_failed": "RuntimeError: no"},
        {**rival, "contestant": "inkan", "absent": "No module named 'inkan'"},
    ]


def test_gpu_tables_say_who_is_missing_and_who_the_rival_is() -> None:
    found = gpu_rows()
    text = tables.TABLES["gpu"](found)
    assert "to the fastest rival of the same function" in text and "| 0.25 (efficient-kan) |" in text
    more = tables.TABLES["gpu_more"](found)
    for table in (text, more):
        assert "inkan is absent: No module named 'inkan'." in table
        assert f"kan_fast triton, {CUDA_SHAPES[0]}, float32: wrong: error 1." in table
    assert "efficient-kan, 4096 x 256 x 256, G=5, float32: RuntimeError: no." in more


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_networks_that_are_wrong_stand_below_their_table(device: str) -> None:
    for what, table, unit in (("network", tables.network, "ms"), ("latency", tables.latency, "us")):
        row = {**HERE, "what": what, "device": device, "kan": [2, 5, 1], "mlp": [2, 9, 1], "batch": 3}
        right = {**row, "batch": 4, f"forward_{unit}": 1.0, f"forward_mlp_{unit}": 2.0, "forward_ratio": 0.5}
        wrong = {**row, "failed": "wrong: y"}
        assert table([wrong], device) == "not yet measured. KAN([2, 5, 1]) on 3 samples: wrong: y."
        text = table([wrong, right], device)
        assert text.endswith(" KAN([2, 5, 1]) on 3 samples: wrong: y.") and "| 4 | 1 " in text and text.count("| KAN") == 1


@pytest.mark.parametrize("name", list(tables.TABLES))
def test_every_table_of_the_committed_rows(name: str) -> None:
    found = plot.committed()
    text = tables.TABLES[name](found)
    assert "nan" not in text.lower()
    for line in (line for line in text.splitlines() if line.startswith("|")):
        assert line.count("|") == text.splitlines()[0].count("|")
