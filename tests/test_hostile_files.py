"""Files made to hurt: a steering file, a model and a control vector are refused in one short line, or are sound.

Single malformed files stand in test_gguf_metadata.py and test_steering_file.py; here every bit of a small file is
flipped, every length tried, and what a file of the right form may hold is drawn at random.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_gguf import ARRAY, BOOL, F32, STRING, U8, U32, U64, array, entry, head, tensor, text

from edge_steer.architectures import architecture
from edge_steer.errors import FormatError, SteerError, quote
from edge_steer.importing.control_vector import import_control_vector
from edge_steer.importing.target import Target, read_target
from edge_steer.model_file import read_model
from edge_steer.provenance import BaseModel
from edge_steer.sites import Site
from edge_steer.steering import Steering, metadata, save_all

LONGEST = 1000  # characters of a message beside the path; one names every known architecture
Read = Callable[[Path], object]


def refused(path: Path, read: Read) -> bool:
    """Whether `read` refuses the file, in one short line. What it raises else is a bug."""
    try:
        read(path)
    except SteerError as error:
        said = str(error).replace(str(path), "")
        assert said.isprintable(), said[:LONGEST]
        assert len(said) <= LONGEST, said[:LONGEST]
        return True
    return False


def saved(path: Path) -> None:
    """Load what is there; what loads can be saved and is then the same."""
    found = Steering.load_all(path)
    again = path.with_suffix(".again")
    save_all(found, again, force=True)
    assert [each.fingerprint for each in Steering.load_all(again)] == [each.fingerprint for each in found]


def model(path: Path) -> None:
    """Read what is there as a model, and everything it is asked for when it is run."""
    file = read_model(path)
    architecture(file.architecture, (each.name for each in file.tensors)).sites(file.block_count)
    assert file.base.embedding_length > 0
    assert file.chat_template is None or isinstance(file.chat_template, str)


# --- small files ----------------------------------------------------------------------------------------------------


def steering(**changes: Any) -> Steering:
    parts: dict[str, Any] = {
        "name": "x", "operator": "selective", "plane": "local", "sites": (Site(1, "ffn_norm"),), "mask": [True],
        "site_plane": [0], "basis": np.eye(2)[None], "base": BaseModel("llama", "m", 2, 2), "angle": 8.0,
    }  # fmt: skip
    return Steering(**{**parts, **changes})


def steering_file(path: Path) -> Path:
    steering().save(path, force=True)
    return path


def value(kind: int, held: Any, item: int | None = None) -> bytes:
    if item is not None:
        packed = b"".join(map(text, held)) if item == STRING else np.asarray(held, _CODES[item]).tobytes()
        return array(item, len(held), packed)
    return text(held) if kind == STRING else np.asarray(held, _CODES[kind]).tobytes()


_CODES = {U8: "<u1", U32: "<u4", F32: "<f4", BOOL: "<u1", U64: "<u8"}


def keys(values: dict[str, Any]) -> list[bytes]:
    """What `metadata` gives, byte by byte."""
    return [entry(key, each.type, value(each.type, each.value, each.item)) for key, each in values.items()]


def model_file(path: Path) -> Path:
    """A model of one block and two tensors, with a steering embedded."""
    sizes = {"block_count": 2, "embedding_length": 2, "context_length": 64}
    path.write_bytes(head(
        entry("general.architecture", STRING, text("llama")),
        entry("general.name", STRING, text("m")),
        *(entry(f"llama.{key}", U32, struct.pack("<I", size)) for key, size in sizes.items()),
        entry("tokenizer.ggml.tokens", ARRAY, array(STRING, 2, text("a") + text("b"))),
        entry("tokenizer.chat_template", STRING, text("{{ x }}")),
        *keys(metadata([steering()])),
        tensors=(tensor("blk.0.attn_q.weight", (2, 2)), tensor("output.weight", (2, 2), 0, 32)), data=bytes(48),
    ))  # fmt: skip
    return path


def control_vector_file(path: Path) -> Path:
    path.write_bytes(head(
        entry("general.architecture", STRING, text("controlvector")),
        entry("controlvector.model_hint", STRING, text("llama")),
        tensors=(tensor("direction.1", (2,)),), data=np.array([1.5, -2], "<f4").tobytes(),
    ))  # fmt: skip
    return path


_TARGET = Target(BaseModel("llama", "m", 2, 2), architecture("llama"))


def vector(path: Path) -> None:
    import_control_vector(path, _TARGET, "v")


SMALL: dict[str, tuple[Callable[[Path], Path], tuple[Read, ...]]] = {
    "steering": (steering_file, (Steering.load_all,)),
    "model": (model_file, (model, Steering.load_all)),
    "control vector": (control_vector_file, (vector,)),
}


@pytest.fixture(params=SMALL)
def small(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, tuple[Read, ...]]:
    make, reads = SMALL[request.param]
    return make(tmp_path / "small.gguf"), reads


def flips(path: Path) -> Iterator[int]:
    """The file with one bit flipped, then the next; whole again at the end."""
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(whole):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
                yield 8 * at + bit
            os.pwrite(file.fileno(), bytes([byte]), at)


def test_small_files_are_sound_as_they_are(small: tuple[Path, tuple[Read, ...]]) -> None:
    path, reads = small
    assert not any(refused(path, read) for read in reads)


@pytest.mark.filterwarnings("error")
def test_every_flipped_bit_is_refused_in_one_short_line_or_is_sound(small: tuple[Path, tuple[Read, ...]]) -> None:
    path, reads = small
    outcomes = {refused(path, read) for _ in flips(path) for read in reads}
    assert outcomes == {True, False}


def test_every_length_but_the_whole_is_refused_in_one_short_line(small: tuple[Path, tuple[Read, ...]]) -> None:
    path, reads = small
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert all(refused(path, read) for read in reads)


# --- drawn at random ------------------------------------------------------------------------------------------------

_ANY_TEXT = st.text(st.characters(), max_size=6).map(lambda drawn: drawn.encode("utf-8", "surrogatepass"))
_TEXTS = st.one_of(
    _ANY_TEXT,
    st.binary(max_size=4),
    st.sampled_from(["local", "global", "selective", "adaptive", "addition", "ablation", "llama", "\0", "a\nb"]),
    st.sampled_from(["blk.0.attn_norm", "blk.1.ffn_norm", "blk.1.layer_out", "blk.999999.ffn_norm", "blk.-1.x"]),
    st.integers(1, 3000).map(lambda n: "é" * n),
)
_NUMBERS: dict[int, st.SearchStrategy[Any]] = {
    U8: st.integers(0, 255),
    U32: st.integers(0, 4) | st.integers(0, 2**32 - 1),
    U64: st.integers(0, 2**64 - 1),
    BOOL: st.integers(0, 1) | st.integers(0, 255),
    F32: st.floats(width=32) | st.sampled_from([0.0, 1.0, -1.0, float("nan"), float("inf"), 3e38]),
}


@st.composite
def _values(draw: st.DrawFn) -> tuple[int, bytes]:
    """A value of any type: scalars, strings, arrays that say how long they are, or lie."""
    kind = draw(st.sampled_from([STRING, ARRAY, ARRAY, *_NUMBERS]))
    if kind == STRING:
        return kind, text(draw(_TEXTS))
    if kind != ARRAY:
        return kind, value(kind, draw(_NUMBERS[kind]))
    item = draw(st.sampled_from([STRING, ARRAY, *_NUMBERS]))
    if item == ARRAY:
        return kind, array(ARRAY, 1) * draw(st.integers(1, 50))
    held = draw(st.lists(_TEXTS if item == STRING else _NUMBERS[item], max_size=5))
    whole = value(kind, held, item)
    count = draw(st.sampled_from([len(held)] * 4 + [0, len(held) + 1, 2**32, 2**63, 2**64 - 1]))
    return kind, array(item, count, whole[12:])


_KEYS = sorted({
    *metadata([steering(), steering(name="y")]), "steering.2.name", "general.alignment", "general.architecture",
    "general.name", "general.type", "llama.block_count", "llama.embedding_length", "split.count", "split.no",
    "tokenizer.ggml.tokens", "tokenizer.chat_template",
})  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.sampled_from(_KEYS), st.none() | _values(), st.integers(0, 9)), max_size=4),
    in_a_model=st.booleans(),
)
def test_files_of_the_right_form_with_anything_in_it_are_refused_or_sound(
    tmp_path: Path, changes: list[tuple[str, tuple[int, bytes] | None, int]], in_a_model: bool
) -> None:
    made = {
        key: (int(each.type), value(each.type, each.value, each.item)) for key, each in metadata([steering()]).items()
    }
    made |= {
        "general.architecture": (STRING, text("llama" if in_a_model else "edge-steer")),
        "llama.block_count": (U32, struct.pack("<I", 2)), "llama.embedding_length": (U32, struct.pack("<I", 2)),
    }  # fmt: skip
    twice: list[bytes] = []
    for key, changed, way in changes:
        if changed is None:
            made.pop(key, None)
        elif way == 0:
            twice.append(entry(key, *changed))
        else:
            made[key] = changed
    path = tmp_path / "made.gguf"
    path.write_bytes(head(*(entry(key, *held) for key, held in made.items()), *twice))
    for read in (saved, model):
        refused(path, read)


# --- one by one -----------------------------------------------------------------------------------------------------


def plain_model(*more: bytes, arch: str = "llama", blocks: int = 2) -> bytes:
    sizes = {"block_count": blocks, "embedding_length": 2}
    return head(
        entry("general.architecture", STRING, text(arch)),
        *(entry(f"{arch}.{key}", U32, struct.pack("<I", size)) for key, size in sizes.items()),
        *more,
    )


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (plain_model(arch="a\nb"), "a name as general.architecture, got 'a"),
        (plain_model(arch="x" * 60_000), "a name as general.architecture"),
        (plain_model(arch="x" * 200), "sites of architecture .* are not known"),
        (plain_model(blocks=2**32 - 1), "llama.block_count from 1 to"),
        (plain_model(entry("general.type", STRING, text("t" * 100_000))), "file of general.type"),
        (
            plain_model(entry("split.count", U32, struct.pack("<I", 2)), entry("split.no", STRING, text("x"))),
            "part 'x'",
        ),
        (plain_model(*[entry("k" * 60_000, U8, b"\0")] * 2), "every key once"),
        (plain_model(entry("k" * 60_000, 99, b"\0")), "a value type"),
    ],
)
def test_a_model_that_lies_is_refused_in_one_short_line(tmp_path: Path, raw: bytes, why: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    assert refused(path, model)
    with pytest.raises(SteerError, match=why):
        model(path)


def test_a_name_of_any_length_goes_into_a_steering_cut(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(plain_model(entry("general.name", STRING, text("n" * 10**6))))
    assert read_target(path).base.name == "n" * 256


@pytest.mark.parametrize(
    ("key", "held"),
    [
        ("0.name", "n" * 10**6), ("0.operator", "o" * 10**6), ("0.plane", "\0" * 10**6), ("base.name", "b" * 10**6),
        ("base.architecture", "a" * 10**6), ("made.model", "\0" * 10**6), ("0.sites", ["s" * 10**6]),
    ],
)  # fmt: skip
def test_a_steering_of_endless_texts_is_refused_in_one_short_line(tmp_path: Path, key: str, held: Any) -> None:
    values = {f"steering.{key}": entry(f"steering.{key}", ARRAY, value(ARRAY, held, STRING))}
    if isinstance(held, str):
        values = {f"steering.{key}": entry(f"steering.{key}", STRING, text(held))}
    rest = {name: each for name, each in metadata([steering()]).items() if name not in values}
    path = tmp_path / "s.gguf"
    path.write_bytes(head(*keys(rest), *values.values()))
    assert refused(path, Steering.load_all)


def test_thousands_of_steerings_in_a_file_that_may_hold_one_are_told_in_one_short_line(tmp_path: Path) -> None:
    path = tmp_path / "s.gguf"
    save_all([steering(name=f"{number:0250}") for number in range(300)], path)
    assert refused(path, Steering.load)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"%0250d" % 1, b"%0250d" % 2))
    assert refused(path, Steering.load_all)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("numbers", [[3e38, 3e38], [1e-45, 0], [np.nan, 1], [np.inf, 0], [0, 0]])
def test_a_control_vector_of_extreme_numbers_is_refused_or_sound(tmp_path: Path, numbers: list[float]) -> None:
    path = control_vector_file(tmp_path / "v.gguf")
    path.write_bytes(path.read_bytes()[:-8] + np.array(numbers, "<f4").tobytes())
    assert refused(path, vector) == (numbers != [1e-45, 0])


def test_what_an_array_claims_is_not_allocated(tmp_path: Path) -> None:
    """A gigabyte of file that claims to be a basis costs no more than itself; one that only claims it, nothing."""
    import tracemalloc

    path = tmp_path / "s.gguf"
    rest = {name: each for name, each in metadata([steering()]).items() if name != "steering.0.basis"}
    for claimed in (2**28, 2**40, 2**61, 2**62):
        path.write_bytes(head(*keys(rest), entry("steering.0.basis", ARRAY, array(F32, claimed, bytes(64)))))
        tracemalloc.start()
        with pytest.raises(FormatError, match="that are left"):
            Steering.load(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20


@pytest.mark.parametrize("value", [np.full((2, 3), 1e6 + 1), "two\nlines", ["\u2028", b"\n"]])
def test_what_a_file_holds_is_quoted_in_one_line(value: object) -> None:
    assert quote(value).isprintable()
