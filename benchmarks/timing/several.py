"""How the hook's cost grows with the steerings that are on, and what dials add that move at every token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from timing.decoding import ANGLE, CONTROL, GENERATED, PLAIN, STEERINGS, Contexts, timed
from timing.rounds import Row

COUNTS = (1, 4, STEERINGS)


def several_rows(contexts: Contexts) -> list[Row]:
    """One, four and eight steerings at all sites; and the first and the last with their dials moving."""
    rows = [Row(PLAIN, contexts.unsteered), Row(CONTROL, lambda: timed(contexts.plain), PLAIN)]
    for count in COUNTS:
        names = [f"every-{i}" for i in range(count)]
        what = f"hook, {count} steering{'s' if count > 1 else ''} at all {len(contexts.every)} sites"
        rows.append(Row(what, partial(contexts.turned, *names), PLAIN))
        if count in (1, STEERINGS):
            rows.append(Row(f"{what}, moved at every token", partial(_moved, contexts, names), PLAIN))
    return rows


def _moved(contexts: Contexts, names: Sequence[str]) -> dict[str, float]:
    llm = contexts.hooked

    def move(token: int) -> None:
        llm.angles = dict.fromkeys(names, ANGLE + token / GENERATED)
        llm._engine.apply(llm.angles.actions())

    with contexts.on(*names):
        return timed(llm, move)
