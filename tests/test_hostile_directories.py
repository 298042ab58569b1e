"""Hugging Face directories made to hurt, read for an export and for a conversion: nothing outside them is opened,
nothing is left out in silence, and whatever a file holds ends in one short line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("safetensors")

from planted import random_steering
from safetensors import SafetensorError, safe_open
from test_hostile_files import refused

from edge_steer.architectures import architecture
from edge_steer.checkpoint import read_config
from edge_steer.converters.weights import read_weights
from edge_steer.errors import FormatError, SteerError
from edge_steer.export.hf_weights import read_checkpoint
from edge_steer.provenance import BaseModel
from edge_steer.safetensors_file import read_safetensors, write_safetensors

WIDTH = 8
CONFIG = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": WIDTH}
INDEX = "model.safetensors.index.json"
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
WEIGHTS = {f"model.layers.0.{name}.weight": np.ones((4, WIDTH), np.float32) for name in PROJECTIONS}
STEERING = random_steering(BaseModel("llama", "m", 1, WIDTH), architecture("llama").sites(1))


def for_export(folder: Path) -> None:
    read_checkpoint(folder).fold([STEERING])


def for_conversion(folder: Path) -> None:
    config = read_config(folder)
    config.integer("num_hidden_layers")
    for weight in read_weights(folder).values():
        assert weight.size >= 0


READERS = (for_export, for_conversion)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(made / "model.safetensors", WEIGHTS)
    return made


def indexed(folder: Path, weight_map: Any) -> Path:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_the_directory_is_read_as_it_is_and_with_an_index(folder: Path) -> None:
    for _ in range(2):
        for read in READERS:
            assert not refused(folder, read)
        if not (folder / INDEX).exists():
            indexed(folder, dict.fromkeys(WEIGHTS, "a.safetensors"))


def test_shards_may_be_links_as_in_the_hub_s_cache(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "blob")
    (folder / "model.safetensors").symlink_to(folder.parent / "blob")
    for read in READERS:
        read(folder)


@pytest.mark.parametrize(
    ("weight_map", "why"),
    [
        ({"more": "../a.safetensors"}, "without folders"),
        ({"more": "/etc/passwd"}, "without folders"),
        ({"more": "sub/a.safetensors"}, "without folders"),
        ({"more": ".."}, "without folders|not there|no such file"),
        ({"more": "a.safetensors"}, "more"),
        ({"more": "b.safetensors"}, "b.safetensors"),
        ({"more": 1}, "weight_map of tensor names"),
        ({"more": ["a.safetensors"]}, "weight_map of tensor names"),
        ({"more": "x" * 5000}, "x"),
        ({"more": "a\0b"}, "a"),
    ],
)
@pytest.mark.parametrize("read", READERS)
def test_an_index_that_leads_elsewhere_or_to_nothing_is_refused(
    folder: Path, weight_map: dict[str, Any], why: str, read: Callable[[Path], None]
) -> None:
    indexed(folder, {**dict.fromkeys(WEIGHTS, "a.safetensors"), **weight_map})
    with pytest.raises(SteerError, match=why):
        read(folder)
    assert refused(folder, read)


@pytest.mark.parametrize("weight_map", [[], {}, None, "a.safetensors", 1])
@pytest.mark.parametrize("read", READERS)
def test_an_index_without_a_map_is_refused(folder: Path, weight_map: Any, read: Callable[[Path], None]) -> None:
    with pytest.raises(SteerError, match="weight_map of tensor names"):
        read(indexed(folder, weight_map))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"text_config": []}, "an object as text_config"),
        ({"model_type": ["llama"]}, r"as model_type, got \['llama'\]"),
        ({"num_hidden_layers": None}, "num_hidden_layers, got None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers, got 0"),
        ({"num_hidden_layers": 1e999}, "num_hidden_layers, got inf"),
        ({"hidden_size": "8"}, "hidden_size, got '8'"),
        ({"hidden_size": True}, "hidden_size, got True"),
        ({"hidden_size": 2**40}, "hidden_size, got"),
        ({"hidden_size": "8" * 10**6}, "hidden_size, got"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(folder: Path, changes: dict[str, Any], why: str) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(SteerError, match=why):
        for_export(folder)
    assert refused(folder, for_export)


def shard(path: Path, header: Any, data: bytes = bytes(4096)) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


FIRST = next(iter(WEIGHTS))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**62] * 200_000, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [4, 1e999], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [4, 8], "data_offsets": [2**70, 2**70 + 128]},
        {"dtype": "F32", "shape": [4, 8], "data_offsets": [4096, 4224]},
        {"dtype": "Q4" * 1000, "shape": [4, 8], "data_offsets": [0, 128]},
        {"dtype": "F32", "shape": {"4": 8}, "data_offsets": [0, 128]},
        {"dtype": "F\x1b[2J", "shape": [4, 8], "data_offsets": [0, 128]},
        {"dtype": "F32"}, [], None, 1,
    ],
)  # fmt: skip
@pytest.mark.parametrize("read", READERS)
def test_a_shard_that_lies_about_a_tensor_is_refused(folder: Path, entry: Any, read: Callable[[Path], None]) -> None:
    whole = {
        name: {"dtype": "F32", "shape": [4, WIDTH], "data_offsets": [128 * place, 128 * place + 128]}
        for place, name in enumerate(WEIGHTS)
    }
    shard(folder / "model.safetensors", {**whole, FIRST: entry})
    assert refused(folder, read)


@pytest.mark.parametrize("read", READERS)
def test_every_length_of_a_shard_but_the_whole_is_refused(folder: Path, read: Callable[[Path], None]) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert refused(folder, read)


# Names of an entry's fields, offsets that leave gaps and overlap, notes that are none; small, so that some are sound.
_ENTRIES = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "X9"]),
            "shape": st.lists(st.sampled_from([0, 1, 2, 4, 8, -1, "2", True, 2.0]), max_size=2),
            "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, 32, -4, 2**64, None]), min_size=2, max_size=2),
        }
    )
    | st.dictionaries(st.text(max_size=2), st.text(max_size=2) | st.integers(), max_size=1),
    max_size=3,
)


def _mapped(path: Path) -> list[Any]:
    return [tensor.memory() for tensor in read_safetensors(path)]


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=_ENTRIES, size=st.sampled_from([0, 4, 8, 16, 32]), spaces=st.sampled_from(["", " "]))
@example(header={}, size=0, spaces="")
@example(header={"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, size=8, spaces=" ")
@example(header={"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, size=16, spaces="")
@example(header={"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, size=16, spaces="")
def test_what_the_safetensors_library_refuses_is_refused(
    tmp_path: Path, header: dict[str, Any], size: int, spaces: str
) -> None:
    path = tmp_path / "x.safetensors"
    shard(path, json.dumps(header).encode() + spaces.encode(), bytes(size))
    try:
        with safe_open(path, framework="numpy") as theirs:
            names = set(theirs.keys())
    except SafetensorError:
        with pytest.raises(FormatError, match=r"expected a safetensors file|as one of"):
            _mapped(path)
    else:
        assert {tensor.name for tensor in read_safetensors(path)} == names


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("a.safetensors"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.sampled_from(["config", "map", "index", "header", "entry"]),
    key=st.sampled_from(
        [*CONFIG, "text_config", "quantization_config", "num_experts", "dtype", "shape", "data_offsets"]
    ),
    drawn=_JSON,
)
def test_anything_in_any_place_is_refused_or_read(folder: Path, place: str, key: str, drawn: Any) -> None:
    entries: dict[str, Any] = {
        name: {"dtype": "F32", "shape": [4, WIDTH], "data_offsets": [128 * number, 128 * number + 128]}
        for number, name in enumerate(WEIGHTS)
    }
    weight_map: dict[str, Any] = dict.fromkeys(WEIGHTS, "a.safetensors")
    config: Any = {**CONFIG, key: drawn} if place == "config" else CONFIG
    if place == "map":
        weight_map[FIRST] = drawn
    if place == "header":
        entries[FIRST] = drawn
    if place == "entry":
        entries[FIRST][key] = drawn
    (folder / "config.json").write_text(json.dumps(config))
    (folder / INDEX).write_text(json.dumps({"weight_map": drawn if place == "index" else weight_map}))
    shard(folder / "a.safetensors", entries, bytes(128 * len(WEIGHTS)))
    for read in READERS:
        refused(folder, read)
