"""Which adapters of a llama-server stand for which steering, and the scales at which they give a dial.

A pair (cos, sin) gives a steering at any angle, scaled cosθ − 1 and sinθ; a whole adapter, at scale 1, the one dial
that it was exported at. Adapters tell what they are where their files can be read here, else by their names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_steer.errors import SteerError, quote
from edge_steer.export.adapter_label import COS, SIN, WHOLE, AdapterLabel, read_label
from edge_steer.export.lora_notes import scales
from edge_steer.export.readers import check_linear
from edge_steer.serve.steering_field import BadRequest, Dial
from edge_steer.steering import Steering

HOW = (
    "start llama-server with --lora-scaled NAME-cos.gguf:0,NAME-sin.gguf:0, as `edge-steer export --to lora` wrote them"
)


@dataclass(frozen=True)
class Listed:
    """An adapter as GET /lora-adapters lists it. scale: where it stands for a request that names none."""

    id: int
    path: str
    scale: float
    label: AdapterLabel | None

    @property
    def name(self) -> str:
        return self.path.replace("\\", "/").rpartition("/")[2]


@dataclass(frozen=True)
class Served:
    """The adapters of one steering. sin: None for a whole one, which stands at `dial` alone."""

    cos: int
    sin: int | None
    dial: float = math.nan

    def scales(self, steering: Steering, dial: Dial) -> dict[int, float]:
        """The scale of each adapter. Raises BadRequest for a dial that a whole adapter does not hold."""
        off = steering.action(dial) is None
        if self.sin is not None:
            cos, sin = (0.0, 0.0) if off or dial is None else scales(dial)
            return {self.cos: cos, self.sin: sin}
        held = steering.operator == "ablation" or (dial is not None and math.isclose(dial, self.dial, rel_tol=1e-4))
        if not off and not held:
            raise BadRequest(
                "steering",
                f"expected {self.dial:g} or off for {quote(steering.name)}, got {dial:g}: llama-server has one adapter "
                "of that dial; export a pair for any angle",
            )
        return {self.cos: 0.0 if off else 1.0}


def parse_list(body: Any) -> list[Listed]:
    """The adapters that GET /lora-adapters told of. Raises SteerError if it is no such list."""
    try:
        return [
            Listed(int(each["id"]), str(each["path"]), float(each["scale"]), _label(str(each["path"]))) for each in body
        ]
    except (TypeError, KeyError, ValueError):
        raise SteerError(f"expected a list of adapters from /lora-adapters, got {quote(body)}") from None


def match(
    steerings: Sequence[Steering], found: Sequence[Listed], given: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Served]:
    """The adapters of each steering. given: their numbers, cos before sin, by name. Raises SteerError where unclear."""
    by_id = {each.id: each for each in found}
    named = dict(given or {})
    matched: dict[str, Served] = {}
    for steering in steerings:
        check_linear(steering)
        if not found:
            raise SteerError(f"expected adapters for {quote(steering.name)}, got a llama-server with none; {HOW}")
        ids = named.pop(steering.name, None)
        matched[steering.name] = _take_given(steering, by_id, ids) if ids else _find(steering, found)
    if named:
        names = ", ".join(each.name for each in steerings)
        raise SteerError(f"expected --adapter of a steering among {names}, got {quote(next(iter(named)))}")
    _check_apart(matched)
    return matched


def parse_order(arguments: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """NAME=COS,SIN or NAME=ID, as --adapter takes it. Raises SteerError if it is neither."""
    found: dict[str, tuple[int, ...]] = {}
    for argument in arguments:
        name, equals, numbers = argument.rpartition("=")
        ids = tuple(int(each) for each in numbers.split(",") if each.strip().isdecimal())
        if not equals or not 1 <= len(ids) <= 2 or len(ids) != len(numbers.split(",")) or name in found:
            raise SteerError(f"expected --adapter NAME=COS,SIN (or NAME=ID), once a name, got {quote(argument)}")
        found[name] = ids
    return found


def all_scales(
    steerings: Sequence[Steering], matched: Mapping[str, Served], others: Mapping[int, float], dials: Mapping[str, Dial]
) -> list[dict[str, Any]]:
    """The field `lora` of a request. others: adapters that are no steering's, with their scales: llama-server takes one
    that is not named for 0. Raises BadRequest for a dial that cannot be had."""
    found = dict(others)
    for each in steerings:
        found |= matched[each.name].scales(each, dials[each.name])
    return [{"id": id, "scale": scale} for id, scale in sorted(found.items())]


def _label(path: str) -> AdapterLabel | None:
    """What an adapter is: by its own keys, else, on another machine or of an older export, by its name."""
    if found := read_label(Path(path)):
        return found
    stem = path.replace("\\", "/").rpartition("/")[2].removesuffix(".gguf")
    for part in (COS, SIN):
        if stem.endswith(f"-{part}"):
            return AdapterLabel(part, stem.removesuffix(f"-{part}"), "")
    return None


def _is_of(steering: Steering, label: AdapterLabel | None) -> bool:
    if label is None:
        return False
    return label.fingerprint == steering.fingerprint if label.fingerprint else label.steering == steering.name


def _find(steering: Steering, found: Sequence[Listed]) -> Served:
    """The adapters whose labels say that they are `steering`'s."""
    mine = [each for each in found if _is_of(steering, each.label)]
    parts = {part: [each for each in mine if each.label and each.label.part == part] for part in (COS, SIN, WHOLE)}
    twice = [part for part in parts if len(parts[part]) > 1]
    if twice:
        names = ", ".join(each.name for each in parts[twice[0]])
        raise SteerError(f"expected one {twice[0]} adapter of {quote(steering.name)}, got {names}; use --adapter")
    if parts[COS] and parts[SIN]:
        return Served(parts[COS][0].id, parts[SIN][0].id)
    if parts[COS] or parts[SIN]:
        got = (parts[COS] or parts[SIN])[0].name
        raise SteerError(f"expected both cos and sin adapters of {quote(steering.name)}, got {got} alone; {HOW}")
    if parts[WHOLE]:
        whole = parts[WHOLE][0]
        return Served(whole.id, None, whole.label.dial if whole.label else math.nan)
    for each in found:
        if each.label and each.label.steering == steering.name and each.label.fingerprint:
            raise SteerError(
                f"{each.name} was exported from another steering called {quote(steering.name)} than the file given: "
                "export that file, and start llama-server with what it writes"
            )
    names = ", ".join(f"{each.id} {each.name}" for each in found)
    example = ",".join(str(each.id) for each in found[:2])
    raise SteerError(
        f"expected adapters of {quote(steering.name)}, got {names}, which do not say that they are its; if they are, "
        f"tell which by --adapter {steering.name}={example} (cos before sin)"
    )


def _take_given(steering: Steering, by_id: Mapping[int, Listed], ids: tuple[int, ...]) -> Served:
    """The adapters that --adapter names, held against their labels."""
    missing = [id for id in ids if id not in by_id]
    if missing:
        raise SteerError(f"expected --adapter numbers among {', '.join(map(str, by_id))}, got {missing[0]}")
    labels = [by_id[id].label for id in ids]
    for id, label in zip(ids, labels, strict=True):
        if label and label.fingerprint and not _is_of(steering, label):
            raise SteerError(
                f"adapter {id} ({by_id[id].name}) was exported from another steering than {quote(steering.name)}"
            )
    parts = [label.part if label else None for label in labels]
    if len(ids) == 2 and (parts[0] == SIN or parts[1] == COS):
        raise SteerError(
            f"adapter {ids[0]} is the sin of {quote(steering.name)} and {ids[1]} its cos: write --adapter "
            f"{steering.name}={ids[1]},{ids[0]}"
        )
    if len(ids) == 1 and parts[0] in (COS, SIN):
        raise SteerError(f"{by_id[ids[0]].name} is one of a pair: write --adapter {steering.name}=COS,SIN")
    if len(ids) == 2:
        return Served(*ids)
    if labels[0] is None and steering.operator != "ablation":
        raise SteerError(f"{by_id[ids[0]].name} does not say at which dial it stands; export a pair for any angle")
    return Served(ids[0], None, labels[0].dial if labels[0] else math.nan)


def _check_apart(matched: Mapping[str, Served]) -> None:
    """Raise SteerError where two steerings would turn one adapter."""
    owners: dict[int, str] = {}
    for name, served in matched.items():
        for id in (served.cos, served.sin):
            if id is not None and owners.setdefault(id, name) != name:
                raise SteerError(f"adapter {id} is both {quote(owners[id])}'s and {quote(name)}'s; use --adapter")
            if id is not None and served.cos == served.sin:
                raise SteerError(f"expected two adapters for {quote(name)}, got {id} twice")
