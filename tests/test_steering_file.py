"""Claims about the steering file: what goes in comes out, and nothing else comes out of a damaged one."""

from __future__ import annotations

import math
import os
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edge_steer import FormatError, SteerError, Steering
from edge_steer.choices import OPERATORS, RANK
from edge_steer.gguf_metadata import Value
from edge_steer.model_file import read_model
from edge_steer.provenance import BaseModel, Made
from edge_steer.sites import Site
from edge_steer.steering import metadata, save_all
from edge_steer.steering_file import add_metadata

T = gguf.GGUFValueType
BASE = BaseModel("llama", "Tiny", 3, 4, "ab" * 32)
MADE = Made("native", "tiny.gguf", "cd" * 32, "0.1.0", "2026-01-31", 24, 23)
SITES = (Site(0, "ffn_norm"), Site(1, "attn_norm"), Site(1, "ffn_norm"))


def steering(operator: str = "selective", **changes: Any) -> Steering:
    rng = np.random.default_rng(7)
    planes = np.linalg.qr(rng.normal(size=(2, 4, 2)))[0].transpose(0, 2, 1)
    parts: dict[str, Any] = {
        "name": f"calm {operator} ±é", "operator": operator, "plane": "local", "sites": SITES,
        "mask": [True, False, True], "site_plane": [1, 0, 1], "basis": planes[:, : RANK[operator]], "base": BASE,
        "separation": [0.5, math.nan, -1.25], "mean_norm": [3.5, math.nan, 7.0],
        "class_means": [[-1.0, 2.5], [math.nan, math.nan], [0.25, 0.5]],
        "description": "two\nlines", "positive": "calm", "negative": "", "threshold": 0.1, "angle": 8.1, "made": MADE,
    }  # fmt: skip
    return Steering(**{**parts, **changes})


def assert_same(a: Steering, b: Steering) -> None:
    for part in fields(Steering):
        mine, other = getattr(a, part.name), getattr(b, part.name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == other.dtype
            assert mine.shape == other.shape
            assert mine.tobytes() == other.tobytes()
        else:
            assert mine == other or (math.isnan(mine) and math.isnan(other)), part.name
    assert a.fingerprint == b.fingerprint


def outcome(path: Path) -> str:
    """The names of the steerings in the file, or what it is refused with."""
    try:
        return " ".join(one.name for one in Steering.load_all(path))
    except SteerError as error:
        return str(error)


def written(folder: Path, values: dict[str, Value], architecture: str = "edge-steer") -> Path:
    path = folder / "made.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    add_metadata(writer, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_field_survives_the_file_exactly(tmp_path: Path, operator: str) -> None:
    made = steering(operator)
    made.save(tmp_path / "s.gguf")
    assert_same(made, Steering.load(tmp_path / "s.gguf"))


def test_a_steering_without_its_optional_parts_survives_too(tmp_path: Path) -> None:
    base = BaseModel("llama", "", 3, 4)
    made = Steering("x", "selective", "global", SITES, [True] * 3, [0] * 3, [np.eye(4)[:2]], base)
    made.save(tmp_path / "s.gguf")
    assert_same(made, Steering.load(tmp_path / "s.gguf"))


def test_several_steerings_keep_their_order_and_their_own_provenance(tmp_path: Path) -> None:
    several = [steering(operator) for operator in OPERATORS]
    several[2] = several[2].with_(made=Made("torch", prompts_sha256="ef" * 32))
    save_all(several, tmp_path / "s.gguf")
    for mine, other in zip(several, Steering.load_all(tmp_path / "s.gguf"), strict=True):
        assert_same(mine, other)
    with pytest.raises(FormatError, match="expected one steering, found 5"):
        Steering.load(tmp_path / "s.gguf")


def test_the_file_holds_each_key_in_exactly_one_type_and_no_tensor(tmp_path: Path) -> None:
    made = steering("adaptive")
    candidates = {f"candidate_{name}": (0.5,) for name in ("min", "max", "negative", "positive")}
    made.with_(made=replace(made.made, orthogonal_to=("refusal",), candidates=("attn_norm",), **candidates)).save(
        tmp_path / "s.gguf"
    )
    reader = gguf.GGUFReader(tmp_path / "s.gguf")
    texts = ("name", "description", "positive", "negative", "operator", "plane")
    expected = {
        "general.architecture": [T.STRING], "general.type": [T.STRING],
        "steering.version": [T.UINT32], "steering.count": [T.UINT32],
        **{f"steering.0.{name}": [T.STRING] for name in texts},
        "steering.0.sites": [T.ARRAY, T.STRING], "steering.0.mask": [T.ARRAY, T.BOOL],
        "steering.0.site_plane": [T.ARRAY, T.UINT32], "steering.0.rank": [T.UINT32],
        **{f"steering.0.{name}": [T.ARRAY, T.FLOAT32] for name in ("basis", "separation", "mean_norm", "class_means")},
        **{f"steering.0.{name}": [T.FLOAT32] for name in ("threshold", "angle", "angle_min", "angle_max")},
        "steering.0.provisional": [T.BOOL],
        "steering.made.orthogonal_to": [T.ARRAY, T.STRING], "steering.made.candidates": [T.ARRAY, T.STRING],
        **{f"steering.made.candidate_{name}": [T.ARRAY, T.FLOAT32] for name in ("min", "max", "negative", "positive")},
        **{f"steering.base.{name}": [T.STRING] for name in ("architecture", "name", "tokenizer_sha256")},
        **{f"steering.base.{name}": [T.UINT32] for name in ("block_count", "embedding_length")},
        **{f"steering.made.{name}": [T.STRING] for name in ("recorder", "model", "prompts_sha256", "version", "date")},
        **{f"steering.made.{name}": [T.UINT32] for name in ("positive_count", "negative_count")},
    }  # fmt: skip
    found = {key: field.types for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert found == expected
    assert reader.fields["GGUF.version"].contents() == 3
    assert reader.fields["general.architecture"].contents() == "edge-steer"
    assert reader.fields["general.type"].contents() == "steering"
    assert reader.fields["steering.0.site_plane"].contents() == [1, 0, 1]
    assert reader.tensors == []


def test_a_model_may_embed_steerings_and_stays_a_model(tmp_path: Path) -> None:
    made = steering()
    sizes = {f"llama.{name}": Value(T.UINT32, size) for name, size in (("block_count", 3), ("embedding_length", 4))}
    path = written(tmp_path, {**sizes, **metadata([made])}, architecture="llama")
    assert_same(made, Steering.load(path))
    assert read_model(path).base.embedding_length == 4
    assert read_model(path).metadata["steering.count"] == 1


def test_a_real_model_that_embeds_none_holds_no_steering(smollm2: Path) -> None:
    with pytest.raises(FormatError, match="holds no steering"):
        Steering.load(smollm2)


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.gguf"
    steering().save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"s\.gguf"):
            Steering.load_all(path)


@pytest.mark.filterwarnings("error")
def test_any_flipped_bit_gives_a_valid_steering_or_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "s.gguf"
    steering("adaptive").save(path)
    whole = path.read_bytes()
    for bit in random.Random(1).sample(range(8 * len(whole)), 2000):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert "\n" not in outcome(path)


REQUIRED = (
    "version", "count", "0.name", "0.operator", "0.plane", "0.sites", "0.mask", "0.site_plane", "0.rank", "0.basis",
    "base.architecture", "base.name", "base.block_count", "base.embedding_length",
)  # fmt: skip


@pytest.mark.parametrize("key", sorted(metadata([steering()])))
def test_a_key_may_be_absent_only_where_it_has_a_default(tmp_path: Path, key: str) -> None:
    values = metadata([steering()])
    del values[key]
    path = written(tmp_path, values)
    if key.removeprefix("steering.") in REQUIRED:
        with pytest.raises(FormatError, match="holds no steering" if key == "steering.version" else key):
            Steering.load(path)
    else:
        assert Steering.load(path).name == steering().name


@pytest.mark.parametrize("key", sorted(metadata([steering()])))
def test_a_key_of_another_type_is_refused_and_named(tmp_path: Path, key: str) -> None:
    values = metadata([steering()])
    wrong = Value(T.ARRAY, [1], T.INT32) if values[key].item else Value(T.UINT64, 1)
    for value in (wrong, Value(T.ARRAY, [True], T.UINT8), Value(T.INT32, 1)):
        with pytest.raises(FormatError, match=key.replace(".", r"\.")):
            Steering.load(written(tmp_path, {**values, key: value}))


NAN, INF = math.nan, math.inf
PLANES = np.stack([np.eye(4)[:2], np.eye(4)[2:]]).astype(np.float32)


def floats(*numbers: float) -> Value:
    return Value(T.ARRAY, list(numbers), T.FLOAT32)


def strings(*texts: str) -> Value:
    return Value(T.ARRAY, list(texts), T.STRING)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("version", Value(T.UINT32, 2), "update edge-steer"),
        ("version", Value(T.UINT32, 0), "expected steering.version 1"),
        ("count", Value(T.UINT32, 0), "at least 1"),
        ("count", Value(T.UINT32, 2**32 - 1), r"steering\.1\.name"),
        ("0.name", Value(T.STRING, ""), "1 to 256"),
        ("0.name", Value(T.STRING, "x" * 257), "1 to 256"),
        ("0.name", Value(T.STRING, "a\x1b[2J"), "control characters"),
        ("0.name", Value(T.STRING, b"\xff"), "UTF-8"),
        ("0.description", Value(T.STRING, "a\x07"), "control characters"),
        ("made.date", Value(T.STRING, "a\nb"), "control characters"),
        ("base.architecture", Value(T.STRING, ""), "architecture"),
        ("base.block_count", Value(T.UINT32, 1), "blocks below 1"),
        ("base.embedding_length", Value(T.UINT32, 0), "width 0"),
        ("base.embedding_length", Value(T.UINT32, 2**32 - 1), "width 4294967295"),
        ("0.operator", Value(T.STRING, "Selective"), "an operator among"),
        ("0.operator", Value(T.STRING, "ablation"), "rank 1"),
        ("0.plane", Value(T.STRING, "paper"), "a plane among"),
        ("0.sites", strings("blk.0.ffn_norm", "blk.1.attn_norm", "blk.1.nothing"), "a site like"),
        ("0.sites", strings("blk.0.ffn_norm", "blk.1.ffn_norm", "blk.1.attn_norm"), "network order"),
        ("0.sites", strings("blk.0.ffn_norm", "blk.0.ffn_norm", "blk.1.attn_norm"), "every site once"),
        ("0.sites", strings("blk.0.ffn_norm"), "per site"),
        ("0.sites", strings("blk.0.ffn_norm", "blk.1.attn_norm", "blk.999999.ffn_norm"), "blocks below 3"),
        ("0.mask", Value(T.ARRAY, [True], T.BOOL), "per site"),
        ("0.site_plane", Value(T.ARRAY, [0, 0, 2], T.UINT32), "plane numbers below 2"),
        ("0.site_plane", Value(T.ARRAY, [0], T.UINT32), "per site"),
        ("0.rank", Value(T.UINT32, 0), "rank 0"),
        ("0.rank", Value(T.UINT32, 1), "rank 2"),
        ("0.rank", Value(T.UINT32, 2**31), "rank 2147483648"),
        ("0.basis", floats(*[0.5] * 15), "15 values"),
        ("0.basis", floats(NAN, *PLANES.ravel()[1:]), "finite basis"),
        ("0.basis", floats(INF, *PLANES.ravel()[1:]), "basis"),
        ("0.basis", floats(*(PLANES.ravel() * 1.01)), "orthonormal"),
        ("0.basis", floats(*[0.5] * 16), "orthonormal"),
        ("0.separation", floats(0.0, 0.0), "per site"),
        ("0.separation", floats(0.0, 0.0, INF), "separation"),
        ("0.mean_norm", floats(0.0, 0.0, -1.0), "not negative"),
        ("0.class_means", floats(0.0, 1.0, 2.0), "two values per site"),
        ("0.class_means", floats(0.0, 1.0), "two values per site"),
        ("0.class_means", floats(0.0, 1.0, 0.0, 1.0, 0.0, INF), "class_means"),
        ("0.threshold", Value(T.FLOAT32, INF), "threshold"),
        ("0.angle", Value(T.FLOAT32, -INF), "angle"),
        ("0.angle_min", Value(T.FLOAT32, 1.0), "safe range"),
    ],
)  # fmt: skip
def test_values_that_make_no_steering_are_refused_with_the_reason(
    tmp_path: Path, key: str, value: Value, why: str
) -> None:
    values = {**metadata([steering()]), f"steering.{key}": value}
    with pytest.raises(FormatError, match=why) as caught:
        Steering.load(written(tmp_path, values))
    assert "made.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_arrays_are_refused(tmp_path: Path) -> None:
    # gguf-py refuses to write them, so the count of the one site list is patched.
    path = tmp_path / "s.gguf"
    steering().save(path)
    raw = path.read_bytes()
    for key, size in ((b"mask", 3), (b"site_plane", 12), (b"basis", 64)):
        start = raw.index(b"steering.0." + key) + len(b"steering.0." + key) + 8
        path.write_bytes(raw[:start] + bytes(8) + raw[start + 8 + size :])
        with pytest.raises(FormatError, match=key.decode()):
            Steering.load(path)


def test_adaptive_needs_its_threshold_and_addition_its_norms(tmp_path: Path) -> None:
    for operator, key in (("adaptive", "threshold"), ("addition", "mean_norm")):
        values = metadata([steering(operator)])
        del values[f"steering.0.{key}"]
        with pytest.raises(FormatError, match=key.replace("_", " ")):
            Steering.load(written(tmp_path, values))


def test_a_name_twice_is_refused_on_both_sides(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="different names"):
        save_all([steering(), steering()], tmp_path / "s.gguf")
    values = metadata([steering(), steering("standard")])
    with pytest.raises(FormatError, match="different names"):
        Steering.load_all(written(tmp_path, {**values, "steering.1.name": values["steering.0.name"]}))


def test_steerings_for_two_models_do_not_share_a_file(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="one model in one file"):
        save_all([steering(), steering("standard", base=BaseModel("llama", "Other", 3, 4))], tmp_path / "s.gguf")
    assert list(tmp_path.iterdir()) == []


def test_numbers_are_rounded_to_what_the_file_holds_before_they_are_saved() -> None:
    made = steering("adaptive", threshold=0.1)
    assert made.threshold == float(np.float32(0.1))


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": [1, 0, 1]}, {"site_plane": [0, -1, 0]}, {"site_plane": [0.5, 0, 0]}, {"site_plane": []},
        {"basis": np.full((1, 2, 4), 1e300)}, {"basis": np.empty((0, 2, 4))}, {"sites": ()}, {"angle": 1e300},
        {"sites": (Site(0, "nothing"), *SITES[1:])}, {"sites": (Site(-1, "ffn_norm"), *SITES[1:])},
        {"name": "\ud800"}, {"made": Made(positive_count=-1)}, {"base": BaseModel("llama", "Tiny", 2**32, 4)},
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_a_steering_that_no_file_could_hold_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="expected"):
        steering(**changes)


# --- whole or not at all ----------------------------------------------------------------------------------------


def test_an_existing_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "s.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(SteerError, match="--force"):
        steering().save(path)
    assert path.read_bytes() == b"mine"
    steering().save(path, force=True)
    assert_same(steering(), Steering.load(path))
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_or_a_device_is_never_replaced(tmp_path: Path) -> None:
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(SteerError, match="a folder or a device"):
            steering().save(path, force=True)


def test_a_missing_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="No such file"):
        steering().save(tmp_path / "absent" / "s.gguf")


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(OSError(28, "No space left on device"), SteerError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, seen: type[BaseException]
) -> None:
    path = tmp_path / "s.gguf"
    path.write_bytes(b"mine")

    def fail(writer: gguf.GGUFWriter) -> None:
        assert len(list(tmp_path.iterdir())) == 2
        raise raised

    monkeypatch.setattr(gguf.GGUFWriter, "write_kv_data_to_file", fail)
    with pytest.raises(seen):
        steering().save(path, force=True)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"mine"
