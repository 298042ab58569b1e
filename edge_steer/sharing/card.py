"""The card of a pack: which steerings it holds, for which model, and what each file must be. `card.json` in a pack."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_steer.errors import FormatError, SteerError, quote
from edge_steer.provenance import CONTROL_CHARACTERS, MAX_NAME, BaseModel
from edge_steer.steering import Steering

CARD, README = "card.json", "README.md"
FORMAT = 1
# Four thousand kilobytes hold the planes of the largest models; nothing honest comes near these.
MOST_CARD, MOST_STEERING, MOST_STEERINGS = 1 << 20, 64 << 20, 256
# Also the name of its file: no separator, no leading dot, nothing that a system reads otherwise.
NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
_MODEL = ("architecture", "name", "block_count", "embedding_length")


@dataclass(frozen=True)
class CardEntry:
    """One steering of a pack: its name, and the size and sha256 of its file, which is called `NAME.gguf`."""

    name: str
    size: int
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.name}.gguf"


@dataclass(frozen=True)
class Card:
    """What a pack says of itself, as far as it is relied on."""

    base: BaseModel
    entries: tuple[CardEntry, ...]

    def choose(self, name: str | None, where: str) -> CardEntry:
        """The steering called `name`; where none is named, the only one. Raises SteerError with the names there are."""
        names = ", ".join(each.name for each in self.entries[:12])
        if name is None:
            if len(self.entries) != 1:
                raise SteerError(f"expected the name of a steering, as in {where}/NAME, got none; it holds {names}")
            return self.entries[0]
        found = next((each for each in self.entries if each.name == name), None)
        if found is None:
            raise SteerError(f"expected a steering among {names} in {where}, got {quote(name)}")
        return found


def parse_card(data: bytes, where: str) -> Card:
    """The card in `data`. Raises FormatError where it is none, or of a format that this release does not read."""
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: expected {CARD} of JSON, got {quote(str(error))}; fetch the pack again") from None
    fields = found if isinstance(found, dict) else {}
    if fields.get("format") != FORMAT:
        raise FormatError(
            f"{where}: expected {CARD} of format {FORMAT}, got {quote(fields.get('format'))}; update edge-steer"
        )
    model, steerings = fields.get("model"), fields.get("steerings")
    if not isinstance(model, dict) or not isinstance(steerings, list) or not 0 < len(steerings) <= MOST_STEERINGS:
        raise FormatError(f"{where}: expected a model and 1 to {MOST_STEERINGS} steerings in {CARD}, got others")
    entries = tuple(_entry(each, where) for each in steerings)
    if len({each.name for each in entries}) != len(entries):
        raise FormatError(f"{where}: expected steerings of different names in {CARD}, got one twice")
    return Card(_base(model, where), entries)


def _base(model: dict[str, Any], where: str) -> BaseModel:
    texts = {key: model.get(key) for key in ("architecture", "name", "tokenizer_sha256")}
    for key, text in texts.items():
        if key == "tokenizer_sha256" and text is None:
            continue
        if not isinstance(text, str) or len(text) > MAX_NAME or re.search(CONTROL_CHARACTERS, text):
            raise FormatError(f"{where}: expected the model's {key} in {CARD} as text, got {quote(text)}")
    numbers = {key: model.get(key) for key in ("block_count", "embedding_length")}
    for key, number in numbers.items():
        if type(number) is not int:
            raise FormatError(f"{where}: expected the model's {key} in {CARD} as a number, got {quote(number)}")
    return BaseModel(**texts, **numbers)  # type: ignore[arg-type]  # seen to be so


def _entry(fields: Any, where: str) -> CardEntry:
    fields = fields if isinstance(fields, dict) else {}
    name, size, sha256 = (fields.get(key) for key in ("name", "size", "sha256"))
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise FormatError(f"{where}: expected a name of letters, digits, - and _ in {CARD}, got {quote(name)}")
    if type(size) is not int or not 0 < size <= MOST_STEERING:
        raise FormatError(f"{where}: expected a size of at most {MOST_STEERING >> 20} MB for {name}, got {quote(size)}")
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise FormatError(f"{where}: expected a sha256 for {name} in {CARD}, got {quote(sha256)}")
    return CardEntry(name, size, sha256)


def check_file(entry: CardEntry, data: bytes, where: str) -> None:
    """Raise FormatError where `data` is not the file that the card tells of."""
    if len(data) != entry.size or (found := hashlib.sha256(data).hexdigest()) != entry.sha256:
        got = f"{len(data)} bytes" if len(data) != entry.size else f"sha256 {found[:12]}…"
        raise FormatError(
            f"{where}/{entry.file}: expected {entry.size} bytes of sha256 {entry.sha256[:12]}… as its card says, got "
            f"{got}; fetch the pack again"
        )


def load_checked(card: Card, entry: CardEntry, file: Path, where: str) -> list[Steering]:
    """The one steering in `file`, which `check_file` has passed. Raises FormatError where it is not the card's."""
    try:
        found = Steering.load(file)
    except SteerError as error:
        raise type(error)(str(error).replace(str(file), f"{where}/{entry.file}")) from None
    if found.name != entry.name or found.base != card.base:
        raise FormatError(
            f"{where}/{entry.file}: expected {entry.name} for {card.base.name or card.base.architecture}, as the card "
            f"says, got {quote(found.name)} for {quote(found.base.name)}; ask whoever made the pack"
        )
    return [found]


# --- making one -------------------------------------------------------------------------------------------------------


def card_fields(
    steerings: Sequence[Steering], files: Mapping[str, bytes], licence: str | None, results: Mapping[str, Any]
) -> dict[str, Any]:
    """What card.json holds, in the order in which a person reads it. files, results: by a steering's name."""
    base = steerings[0].base
    return {
        "format": FORMAT,
        "model": {
            **{key: getattr(base, key) for key in _MODEL},
            **({"tokenizer_sha256": base.tokenizer_sha256} if base.tokenizer_sha256 else {}),
        },
        "licence": licence,
        "steerings": [
            {
                "name": each.name,
                "size": len(files[each.name]),
                "sha256": hashlib.sha256(files[each.name]).hexdigest(),
                "description": each.description,
                "positive": each.positive,
                "negative": each.negative,
                "operator": each.operator,
                "sites": len(each.steered),
                **{key: _number(getattr(each, key)) for key in ("angle", "angle_min", "angle_max")},
                "provisional": each.provisional,
                **({"results": results[each.name]} if each.name in results else {}),
            }
            for each in steerings
        ],
    }


def _number(value: float) -> float | None:
    return None if value != value else float(f"{value:.6g}")  # JSON has no NaN


def readme(card: Mapping[str, Any], title: str) -> str:
    """README.md of a pack, from the fields of its card. The head is what the Hugging Face hub reads."""
    model, first = card["model"], card["steerings"][0]
    lines = [
        "---", "tags:", "- edge-steer", "- steering", "---", "",
        f"# {title}", "",
        f"Steerings for {model['name'] or model['architecture']} ({model['architecture']}, {model['block_count']} "
        f"layers, width {model['embedding_length']}), for [edge-steer](https://pypi.org/project/edge-steer/).", "",
        "| name | from (−) | to (+) | range | default | |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for each in card["steerings"]:
        low, high = each["angle_min"], each["angle_max"]
        measured = "not measured" if low is None or high is None else f"{low:g} … {high:g}"
        quick = "provisional" if each["provisional"] else ""
        default = "–" if each["angle"] is None else f"{each['angle']:g}"
        lines.append(f"| {each['name']} | {each['negative']} | {each['positive']} | {measured} | {default} | {quick} |")
    lines += [""]
    if any("results" in each for each in card["steerings"]):
        lines += ["Results, as `card.json` has them:", ""]
        lines += [
            f"- {each['name']}: `{json.dumps(each['results'], ensure_ascii=False)}`"
            for each in card["steerings"] if "results" in each
        ]  # fmt: skip
        lines += [""]
    return "\n".join([
        *lines,
        "```sh",
        f"edge-steer chat -m MODEL.gguf -s PACK.zip/{first['name']}        # from a file",
        f"edge-steer chat -m MODEL.gguf -s hub:USER/REPO/{first['name']}   # from the hub",
        "```", "",
        f"Licence: {card['licence'] or 'not stated'}.", "",
    ])  # fmt: skip
