"""Readings in the terminal: a token's colour, what the colours mean, and a line about an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from edge_steer.runtime.answer import Answer, Piece

if TYPE_CHECKING:
    from edge_steer.runtime.llama import SteeredLlama

# From which reading on a token has which of the terminal's 256 colours; below the first, and between, as it is.
_COLOURS = ((-1.0, 33), (-1 / 3, 75), (1 / 3, None), (1.0, 215))
_MOST = 208


def choose_sites(llm: SteeredLlama, site: str | None) -> tuple[str, ...]:
    """The names of the model's steerings, each to be read at `site`. Raises SteerError if one cannot be read there."""
    from edge_steer.errors import SteerError
    from edge_steer.sites import Site

    names = tuple(each.name for each in llm.steerings)
    if not names:
        raise SteerError("there is no steering to read by; give one with -s FILE")
    for name in names:
        if site is not None:
            llm.token_readings.choose(name, Site.parse(site))
    llm.token_readings.check(names)
    return names


def colour_piece(piece: Piece) -> str:
    """A piece's text in the colour of its first reading."""
    if not piece.readings:
        return piece.text
    reading = next(iter(piece.readings.values()))
    colour = next((colour for below, colour in _COLOURS if reading < below), _MOST)
    return click.style(piece.text, fg=colour) if colour is not None else piece.text


def legend(llm: SteeredLlama) -> str:
    """What the colours mean, of the first steering."""
    steering = llm.steerings[0]
    low, high = (click.style("below", fg=_COLOURS[0][1]), click.style("above", fg=_MOST))
    return (
        f"colours: {steering.name} at {llm.token_readings.site(steering.name)}, "
        f"{low} -1 {steering.negative} … {steering.positive} {high} +1"
    )


def summary(answer: Answer) -> str:
    """Mean readings of an answer and of its prompt, whose first token all others lean on."""
    assert answer.readings is not None
    assert answer.prompt_readings is not None
    return "read: " + ", ".join(
        f"{name} {_mean(found)} (prompt {_mean(answer.prompt_readings[name][1:])})"
        for name, found in answer.readings.items()
    )


def as_json(llm: SteeredLlama, answer: Answer) -> dict[str, Any]:
    """The readings of an answer's tokens and of its prompt's."""

    def rounded(found: Mapping[str, Any] | None, name: str) -> list[float]:
        return [round(float(each), 4) for each in (found or {})[name]]

    return {
        name: {
            "site": llm.token_readings.site(name).name,
            "prompt": rounded(answer.prompt_readings, name),
            "answer": rounded(answer.readings, name),
        }
        for name in answer.readings or ()
    }


def _mean(found: Any) -> str:
    return f"{np.mean(found):+.2f}" if len(found) else "–"
