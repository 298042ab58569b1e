"""The measured steerings that ship: a pack for each of some known models, in `models/steerings/`."""

from __future__ import annotations

import functools
from pathlib import Path

from edge_steer.errors import SteerError, quote
from edge_steer.model_file import read_model
from edge_steer.registry import is_known, models_folder
from edge_steer.sharing.card import CARD, Card, parse_card

FOLDER = "steerings"


@functools.cache
def shipped_packs() -> dict[str, Card]:
    """The cards by the model's name in the registry."""
    folder = models_folder() / FOLDER
    cards = sorted(folder.glob(f"*/{CARD}"))
    return {card.parent.name: parse_card(card.read_bytes(), str(card.parent)) for card in cards}


def shipped_names(model: str) -> tuple[str, ...]:
    """The steerings that ship for a model of the registry."""
    card = shipped_packs().get(model)
    return tuple(each.name for each in card.entries) if card else ()


def shipped_file(name: str, model: str | Path) -> Path:
    """The steering `name` measured for `model`: a name of the registry, or a GGUF of the same model.

    Raises SteerError, with what there is, where none ships.
    """
    known = _known_name(model)
    names = shipped_names(known) if known else ()
    if name not in names:
        there = f"for it there are {', '.join(names)}" if names else f"they are for {', '.join(shipped_packs())}"
        raise SteerError(
            f"expected a steering file or a measured steering, got {quote(name)}: no such file, and none ships for "
            f"{Path(model).name} ({there}); `edge-steer calibrate` makes one"
        )
    return models_folder() / FOLDER / str(known) / f"{name}.gguf"


def _known_name(model: str | Path) -> str | None:
    path = Path(model)
    if not path.is_file():
        return str(model) if is_known(str(model)) else None
    base = read_model(path).base
    return next((each for each, card in shipped_packs().items() if card.base == base), None)
