"""The GGUF form of steerings: keys, their types, and which may be absent. What the values mean is `steering.py`'s.

A steering passes through here as plain fields: those of the Steering dataclass by name, `sites` as names, `base` and
`made` as mappings. The same keys stand in a steering file and in a model that embeds steerings.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGUFValueType

from edge_steer.errors import FormatError, SteerError
from edge_steer.gguf_metadata import Value, read_gguf
from edge_steer.whole_file import whole_file

VERSION = 1
_VERSION_KEY = "steering.version"
ARCHITECTURE = "edge-steer"

Fields = dict[str, Any]
Kind = tuple[GGUFValueType, GGUFValueType | None]


def _array_of(item: GGUFValueType) -> Kind:
    return GGUFValueType.ARRAY, item


_TEXT: Kind = (GGUFValueType.STRING, None)
_U32: Kind = (GGUFValueType.UINT32, None)
_F32: Kind = (GGUFValueType.FLOAT32, None)
_BOOL: Kind = (GGUFValueType.BOOL, None)

_STEERING: dict[str, Kind] = {
    **dict.fromkeys(("name", "description", "positive", "negative", "operator", "plane"), _TEXT),
    "sites": _array_of(GGUFValueType.STRING),
    "mask": _array_of(GGUFValueType.BOOL),
    "site_plane": _array_of(GGUFValueType.UINT32),
    "rank": _U32,
    **dict.fromkeys(("basis", "separation", "mean_norm", "class_means"), _array_of(GGUFValueType.FLOAT32)),
    **dict.fromkeys(("threshold", "angle", "angle_min", "angle_max"), _F32),
    "provisional": _BOOL,
    "gate": _TEXT,
}
_REQUIRED = {"name", "operator", "plane", "sites", "mask", "site_plane", "rank", "basis"}
_BASE: dict[str, Kind] = {
    "architecture": _TEXT, "name": _TEXT, "block_count": _U32, "embedding_length": _U32, "tokenizer_sha256": _TEXT,
}  # fmt: skip
_BASE_REQUIRED = _BASE.keys() - {"tokenizer_sha256"}
_MADE: dict[str, Kind] = {
    **dict.fromkeys(("recorder", "model", "prompts_sha256", "version", "date"), _TEXT),
    **dict.fromkeys(("positive_count", "negative_count"), _U32),
    **dict.fromkeys(("orthogonal_to", "candidates"), _array_of(GGUFValueType.STRING)),
    **dict.fromkeys(
        ("candidate_min", "candidate_max", "candidate_negative", "candidate_positive"),
        _array_of(GGUFValueType.FLOAT32),
    ),
}


def read(path: Path) -> list[Fields]:
    """The fields of every steering in `path`, in order; absent optional ones are left out.

    Raises FormatError if the file holds no steering, or one that is not in this form, SteerError where it cannot
    be read.
    """
    values = read_gguf(path, lambda key: key.startswith("steering.")).values
    if not holds_steerings(values):
        raise FormatError(f"{path}: holds no steering; give a file made by `edge-steer calibrate`")
    version = _take(path, values, _VERSION_KEY, _U32)
    if version != VERSION:
        raise FormatError(f"{path}: expected {_VERSION_KEY} {VERSION}, got {version}; update edge-steer")
    count = _take(path, values, "steering.count", _U32)
    if count == 0:
        raise FormatError(f"{path}: expected steering.count of at least 1, got 0")
    base = _section(path, values, "steering.base.", _BASE, _BASE_REQUIRED)
    made = _section(path, values, "steering.made.", _MADE)
    steerings = []
    for number in range(count):
        prefix = f"steering.{number}."
        fields = _section(path, values, prefix, _STEERING, _REQUIRED)
        fields["basis"] = _planes(path, prefix, fields["basis"], fields.pop("rank"), base["embedding_length"])
        if "class_means" in fields:
            fields["class_means"] = _pairs(path, f"{prefix}class_means", fields["class_means"])
        own = _section(path, values, f"{prefix}made.", _MADE)
        steerings.append({**fields, "base": base, "made": own or made})
    return steerings


def holds_steerings(keys: Container[str]) -> bool:
    """Whether a GGUF with these keys holds steerings: a steering file, or a model that embeds some."""
    return _VERSION_KEY in keys


def _describe(kind: Kind) -> str:
    return f"array of {kind[1].name}" if kind[1] is not None else kind[0].name


def _take(path: Path, values: Mapping[str, Value], key: str, kind: Kind) -> Any:
    value = values.get(key)
    if value is None:
        raise FormatError(f"{path}: expected the key {key} ({_describe(kind)}), found none")
    if (value.type, value.item) != kind:
        raise FormatError(f"{path}: expected {key} as {_describe(kind)}, got {_describe((value.type, value.item))}")
    return value.value


def _section(
    path: Path, values: Mapping[str, Value], prefix: str, kinds: Mapping[str, Kind], required: Collection[str] = ()
) -> Fields:
    return {
        name: _take(path, values, prefix + name, kind)
        for name, kind in kinds.items()
        if name in required or prefix + name in values
    }


def _planes(path: Path, prefix: str, basis: np.ndarray[Any, Any], rank: int, width: int) -> np.ndarray[Any, Any]:
    plane = rank * width
    if rank not in (1, 2) or plane == 0 or basis.size % plane or not basis.size:
        raise FormatError(
            f"{path}: expected {prefix}basis of planes × rank × width values with rank 1 or 2, "
            f"got {basis.size} values, rank {rank}, width {width}"
        )
    return basis.reshape(-1, rank, width)


def _pairs(path: Path, key: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if values.size % 2:
        raise FormatError(f"{path}: expected {key} of two values per site, got {values.size} values")
    return values.reshape(-1, 2)


def metadata(steerings: Sequence[Mapping[str, Any]]) -> dict[str, Value]:
    """The keys of `steerings` with their values, for a file of their own or to embed in a model's GGUF.

    All must be for one model. Provenance that differs from the first steering's stands under `steering.{i}.made.`.
    Raises SteerError if there is none, for several models, or several of one name.
    """
    if not steerings:
        raise SteerError("expected at least one steering to write, got none")
    base, made = steerings[0]["base"], steerings[0]["made"]
    for steering in steerings[1:]:
        if steering["base"] != base:
            raise SteerError(
                f"expected steerings for one model in one file, got {steerings[0]['name']!r} for {base['name']!r} "
                f"and {steering['name']!r} for {steering['base']['name']!r}; write a file for each"
            )
    names = [steering["name"] for steering in steerings]
    if len(set(names)) != len(names):
        raise SteerError(f"expected steerings of different names in one file, got {', '.join(names)}; rename one")

    sections: list[tuple[str, Mapping[str, Kind], Mapping[str, Any]]] = []
    for number, steering in enumerate(steerings):
        fields = {**steering, "gate": steering["gate"] or None, "rank": steering["basis"].shape[1]}
        fields.update((name, steering[name].ravel()) for name in ("basis", "class_means"))
        sections.append((f"steering.{number}.", _STEERING, fields))
        if steering["made"] != made:
            sections.append((f"steering.{number}.made.", _MADE, steering["made"]))
    sections += [("steering.base.", _BASE, base), ("steering.made.", _MADE, made)]
    return {
        _VERSION_KEY: Value(_U32[0], VERSION),
        "steering.count": Value(_U32[0], len(steerings)),
        **{
            prefix + name: Value(kind, fields[name], item)
            for prefix, kinds, fields in sections
            for name, (kind, item) in kinds.items()
            if fields[name] is not None and not (item is not None and len(fields[name]) == 0)  # as gguf-py drops it
        },
    }


def add_metadata(writer: GGUFWriter, values: Mapping[str, Value]) -> None:
    """Give `values` to gguf-py's writer, each with exactly its type."""
    for key, value in values.items():
        plain = value.value.tolist() if isinstance(value.value, np.ndarray) else value.value
        writer.add_key_value(key, plain, value.type, value.item)


def write(steerings: Sequence[Mapping[str, Any]], path: Path, *, force: bool = False) -> None:
    """Write a steering file, whole or not at all. Raises SteerError if `path` exists and `force` is not given."""
    values = metadata(steerings)
    with whole_file(path, force=force) as part:
        writer = GGUFWriter(part, ARCHITECTURE)
        try:
            writer.add_type("steering")
            add_metadata(writer, values)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
        finally:
            writer.close()
