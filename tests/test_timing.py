"""The benchmark tells the shares it was given: planted ratios come back, and a limit out of reach is missed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from page import write_part
from timing.decoding import Contexts
from timing.picture import draw
from timing.rounds import Row, Share, rounds_of, table
from timing.shapes import SHAPES, build

from edge_steer.model_file import read_model
from edge_steer.sweep.figure import new_figure


def test_a_planted_share_is_found_with_an_interval_around_it() -> None:
    rng = np.random.default_rng(0)
    drift = rng.uniform(1, 3, 40)  # what slows a round slows both rows
    base, row = drift * rng.normal(1, 0.01, 40), drift / 0.9 * rng.normal(1, 0.01, 40)
    share = Share.of(list(base), list(row))
    assert share.low < 0.9 < share.high
    assert share.high - share.low < 0.02


def test_rows_with_other_numbers_of_rounds_are_compared_by_their_medians() -> None:
    share = Share.of([1.0, 1.0, 1.1], [4.0, 4.0])
    assert share.median == 0.25
    assert 0.25 <= share.low <= share.high <= 1.1 / 4


def test_every_round_runs_every_row_once_in_changing_order() -> None:
    ran: list[str] = []

    def run(name: str) -> Callable[[], Mapping[str, float]]:
        return lambda: (ran.append(name), {"token": 1.0})[1]

    rows = [Row(name, run(name)) for name in "abcd"]
    times = rounds_of(rows, rounds=8, seconds=0, note=lambda _: None)
    assert {name: len(each) for name, each in times.items()} == dict.fromkeys("abcd", 8)
    orders = ["".join(ran[i : i + 4]) for i in range(0, 32, 4)]
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(set(orders)) > 1


def test_at_least_two_rounds_are_run_however_short_the_time() -> None:
    rows = [Row("a", lambda: {"token": 1.0})]
    assert len(rounds_of(rows, rounds=None, seconds=0, note=lambda _: None)["a"]) == 2


def test_the_table_tells_speed_share_and_whether_the_limit_is_met() -> None:
    def nothing() -> Mapping[str, float]:
        raise AssertionError

    rows = [
        Row("plain", nothing),
        Row("good", nothing, "plain", {"token": 0.99}),
        Row("slow", nothing, "plain", {"token": 0.99}),
        Row("other", nothing, "plain", {"token": 0.99}),
    ]
    times = {
        "plain": [{"token": 0.01}] * 3,
        "good": [{"token": t} for t in (0.0101, 0.0102, 0.01005)],
        "slow": [{"token": t} for t in (0.0125, 0.0125, 0.0126)],
        "other": [{"prompt": 1.0}] * 3,
    }
    lines = table(rows, times, {"token": "tokens/s"})
    assert lines[2] == "| plain | 100 | 1 |  |"
    assert lines[3].endswith("≥ 0.99: met |")
    assert lines[4] == "| slow | 80 | 0.800 [0.794, 0.800] | ≥ 0.99: **missed** |"
    assert lines[5] == "| other | – | – |  |"


def test_a_shape_s_gguf_has_its_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from timing import shapes

    monkeypatch.setenv("EDGE_STEER_CACHE", str(tmp_path))
    small = shapes.Shape("Small", 12, 256, 512, 4, 2, vocabulary=300, context=512)
    monkeypatch.setitem(SHAPES, "small", small)
    path = build("small")
    file = read_model(path)
    assert (file.block_count, file.embedding_length, file.context_length) == (12, 256, 512)
    assert len(file.tensors) == 2 + 12 * 9
    assert [each.shape for each in file.tensors if each.name == "blk.1.ffn_up.weight"] == [(256, 512)]
    changed = path.stat().st_mtime_ns
    assert build("small") == path
    assert path.stat().st_mtime_ns == changed
    with ExitStack() as stack:  # it can be steered, which is what it is for
        contexts = Contexts(path, 1, 0, stack)
        contexts.hooked.eval([1, 2, 3])
        with contexts.on("every-0"):
            contexts.hooked.eval([4])
        assert contexts.hooked.sites_hit == len(contexts.every)


def test_each_benchmark_replaces_its_own_part_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    write_part(page, "one.py", "first\n")
    write_part(page, "two.py", "second")
    page.write_text(page.read_text().replace("# Results\n", "# Results\n\nBy hand.\n") + "\nMore by hand.\n")
    write_part(page, "one.py", "third")
    assert page.read_text() == (
        "# Results\n\nBy hand.\n\n<!-- benchmarks/one.py -->\nthird\n\n<!-- end of benchmarks/one.py -->\n\n"
        "<!-- benchmarks/two.py -->\nsecond\n\n<!-- end of benchmarks/two.py -->\n\nMore by hand.\n"
    )


def test_the_picture_has_a_dot_for_every_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timing.picture as module

    figures = []
    monkeypatch.setattr(module, "new_figure", lambda size: figures.append(new_figure(size)) or figures[-1])
    rows = [Row("plain", dict), Row("half", dict, "plain", {"token": 0.6})]
    times = {"plain": [{"token": 1.0}] * 3, "half": [{"token": 2.0}] * 3}
    draw(tmp_path / "speed.png", {"a model": (rows, times)}, {"token": "generation, tokens/s"})
    (axis,) = figures[0].axes
    assert [
        float(line.get_xdata()[0]) for line in axis.lines if line.get_marker() in ("o", "|") and len(line.get_xdata())
    ] == [0.5, 0.6]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["half"]
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
