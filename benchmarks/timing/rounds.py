"""Timing that survives a busy machine: rows run interleaved, in a new order every round, and are told as medians and
as ratios to a baseline row of the same round, with bootstrap intervals.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

RESAMPLED = 10_000


@dataclass(frozen=True)
class Row:
    """One thing to time. run: does it once and tells the seconds per unit of each metric.

    against: the row whose speed is 1; None for a baseline. limits: the least share of that speed, by metric.
    """

    name: str
    run: Callable[[], Mapping[str, float]]
    against: str | None = None
    limits: Mapping[str, float] = field(default_factory=dict)


Times = dict[str, list[Mapping[str, float]]]  # of each row, one per round


def rounds_of(
    rows: Sequence[Row], *, rounds: int | None, seconds: float, note: Callable[[str], object], least: int = 2
) -> Times:
    """The times of every row: `rounds` of them, or as many as fit into `seconds`, at least `least`."""
    times: Times = {row.name: [] for row in rows}
    order = random.Random(0)
    begun, done = time.perf_counter(), 0
    while done < rounds if rounds else done < least or time.perf_counter() - begun < seconds * done / (done + 1):
        for row in order.sample(rows, len(rows)):
            times[row.name].append(row.run())
        done += 1
        note(f"round {done}, {time.perf_counter() - begun:.0f} s")
    return times


@dataclass(frozen=True)
class Share:
    """A row's speed as a share of its baseline's: the median over rounds and its bootstrap 95% interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @classmethod
    def of(cls, baseline: Sequence[float], row: Sequence[float]) -> Share:
        """Of seconds, round by round; where the rounds differ in number, of medians drawn apart."""
        rng = np.random.default_rng(0)
        one, other = np.asarray(baseline), np.asarray(row)
        if len(one) == len(other):
            ratios = one / other
            drawn = np.median(_resampled(rng, ratios), axis=1)
            return cls(float(np.median(ratios)), *_interval(drawn))
        drawn = np.median(_resampled(rng, one), axis=1) / np.median(_resampled(rng, other), axis=1)
        return cls(float(np.median(one) / np.median(other)), *_interval(drawn))


def _resampled(rng: np.random.Generator, values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[rng.integers(len(values), size=(RESAMPLED, len(values)))]


def _interval(drawn: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def table(rows: Sequence[Row], times: Times, metrics: Mapping[str, str]) -> list[str]:
    """A Markdown table of `rows`: per metric (name to heading) units per second and share of the baseline.

    A limit counts as met where the interval of the share reaches it.
    """
    heads = [f"{title} | share [95%]" for title in metrics.values()]
    lines = [f"| | {' | '.join(heads)} | limit |", f"|---|{'---:|---:|' * len(metrics)}---|"]
    for row in rows:
        cells, verdicts = [], []
        for metric in metrics:
            spent = _column(times[row.name], metric)
            if not spent:
                cells += ["–", "–"]
                continue
            cells.append(f"{1 / float(np.median(spent)):.4g}")
            share = Share.of(_column(times[row.against], metric), spent) if row.against else None
            cells.append(str(share) if share else "1")
            if share and metric in row.limits:
                limit, which = row.limits[metric], f"{metric} " if len(metrics) > 1 else ""
                verdicts.append(f"{which}≥ {limit:g}: {'met' if share.high >= limit else '**missed**'}")
        lines.append(f"| {row.name} | {' | '.join(cells)} | {', '.join(verdicts)} |")
    return lines


def shares(name: str, against: str, times: Times, metrics: Iterable[str]) -> dict[str, Share]:
    """By metric, the speed of row `name` as a share of that of row `against`."""
    return {metric: Share.of(_column(times[against], metric), _column(times[name], metric)) for metric in metrics}


def _column(times: Iterable[Mapping[str, float]], metric: str) -> list[float]:
    return [each[metric] for each in times if metric in each]
