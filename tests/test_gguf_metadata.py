"""Claims about reading the head of GGUF files: exact on honest ones, one clear error on all others."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from raw_gguf import ARRAY, BOOL, STRING, U8, U32, U64, array, entry, head, tensor, text

from edge_steer.errors import FormatError, SteerError
from edge_steer.gguf_metadata import Gguf, read_gguf
from edge_steer.model_file import TOKENS, read_model


def read(folder: Path, raw: bytes, wanted: bool = True, hashed: str = "") -> Gguf:
    path = folder / "file.gguf"
    path.write_bytes(raw)
    return read_gguf(path, lambda key: wanted, hashed=hashed)


def outcome(folder: Path, raw: bytes, wanted: bool = True) -> str:
    """What the file is refused with, its name where it is read."""
    try:
        read(folder, raw, wanted)
    except FormatError as error:
        return str(error)
    return "file.gguf"


def test_every_kind_of_value_is_read_as_gguf_py_wrote_it(tmp_path: Path) -> None:
    kinds = gguf.GGUFValueType
    written: dict[str, tuple[Any, Any, Any]] = {
        "u8": (255, kinds.UINT8, None), "i8": (-128, kinds.INT8, None),
        "u16": (65535, kinds.UINT16, None), "i16": (-32768, kinds.INT16, None),
        "u32": (2**32 - 1, kinds.UINT32, None), "i32": (-(2**31), kinds.INT32, None),
        "u64": (2**64 - 1, kinds.UINT64, None), "i64": (-(2**63), kinds.INT64, None),
        "f32": (0.5, kinds.FLOAT32, None), "f64": (0.1, kinds.FLOAT64, None),
        "bool": (True, kinds.BOOL, None), "string": ("θ‖h‖\n", kinds.STRING, None),
        "[u32]": ([1, 2**32 - 1], kinds.ARRAY, kinds.UINT32), "[f32]": ([0.5, -2.0], kinds.ARRAY, kinds.FLOAT32),
        "[bool]": ([True, False], kinds.ARRAY, kinds.BOOL), "[string]": (["", "é"], kinds.ARRAY, kinds.STRING),
    }  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "some")
    for key, (value, kind, item) in written.items():
        writer.add_key_value(key, value, kind, item)
    writer.add_tensor("a", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("b", np.arange(4, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    found = read_gguf(tmp_path / "all.gguf", lambda key: True)
    for key, (value, kind, item) in written.items():
        got = found.values[key]
        assert (got.type, got.item) == (kind, item)
        assert (got.value.tolist() if isinstance(got.value, np.ndarray) else got.value) == value
    reader = gguf.GGUFReader(tmp_path / "all.gguf")
    assert found.data_start == reader.data_offset
    assert [(t.name, t.shape, t.type) for t in found.tensors] == [("a", (3, 2), 0), ("b", (4,), 1)]
    assert [found.data_start + t.offset for t in found.tensors] == [t.data_offset for t in reader.tensors]


def test_what_is_not_wanted_is_passed_over_and_scalars_stay(tmp_path: Path) -> None:
    raw = head(
        entry("s", STRING, text(b"\xff")),
        entry("a", ARRAY, array(STRING, 2, text(b"\xff") + text("x"))),
        entry("b", ARRAY, array(U32, 2, bytes(8))),
        entry("n", U32, struct.pack("<I", 7)),
    )
    found = read(tmp_path, raw, wanted=False)
    assert {key: value.value for key, value in found.values.items()} == {"n": 7}


def test_version_2_and_an_alignment_of_the_file_s_own_are_read(tmp_path: Path) -> None:
    raw = head(entry("general.alignment", U32, struct.pack("<I", 64)), tensors=(tensor("t", (2,)),), version=2)
    raw += bytes(-len(raw) % 64) + bytes(8)
    found = read(tmp_path, raw)
    assert found.data_start % 64 == 0
    assert found.data_start + 8 == len(raw)


def test_the_hash_is_of_the_length_prefixed_strings(tmp_path: Path) -> None:
    tokens = [b"<s>", b"", b"\xff\xfe", "é".encode()]
    raw = head(entry("t", ARRAY, array(STRING, len(tokens), b"".join(map(text, tokens)))), entry("n", U8, b"\1"))
    expected = hashlib.sha256(b"".join(struct.pack("<Q", len(token)) + token for token in tokens)).hexdigest()
    assert read(tmp_path, raw, wanted=False, hashed="t").sha256 == expected
    assert read(tmp_path, raw, wanted=False).sha256 is None
    assert read(tmp_path, raw, wanted=False, hashed="other").sha256 is None


HUGE = 2**63
HOSTILE = {
    "empty": b"",
    "another magic": b"GGML" + head()[4:],
    "version 1": head(version=1),
    "version 4": head(version=4),
    "big-endian": head(version=0x03000000),
    "more keys than bytes": head(keys=2**64 - 1),
    "more keys than any file has": head(keys=70000) + bytes(13 * 70000),
    "more tensors than bytes": head(infos=2**64 - 1),
    "a key that is too long": head(entry("k" * 65536, U8, b"\0")),
    "a key longer than the file": head(struct.pack("<Q", HUGE) + bytes(8), keys=1),
    "a key that is not UTF-8": head(entry(b"\xff", U8, b"\0")),
    "a key twice": head(entry("k", U8, b"\0"), entry("k", U8, b"\0")),
    "an unknown value type": head(entry("k", 13, b"\0")),
    "a string longer than the file": head(entry("k", STRING, struct.pack("<Q", HUGE))),
    "a string that is not UTF-8": head(entry("k", STRING, text(b"a\xff"))),
    "a boolean of 2": head(entry("k", BOOL, b"\2")),
    "a boolean of 2 in an array": head(entry("k", ARRAY, array(BOOL, 2, b"\1\2"))),
    "2^63 bytes": head(entry("k", ARRAY, array(U8, HUGE))),
    "2^64 - 1 numbers": head(entry("k", ARRAY, array(U64, 2**64 - 1))),
    "2^63 strings": head(entry("k", ARRAY, array(STRING, HUGE))),
    "an unknown item type": head(entry("k", ARRAY, array(99, 1, b"\0"))),
    "an array of arrays": head(entry("k", ARRAY, array(ARRAY, 1, array(U8, 1, b"\0")))),
    "deeply nested arrays": head(entry("k", ARRAY, array(ARRAY, 1) * 10000)),
    "a string of 2^64 - 1 in an array": head(entry("k", ARRAY, array(STRING, 2, b"\xff" * 8 + bytes(8)))),
    "a last string past the end": head(entry("k", ARRAY, array(STRING, 2, text("a") + struct.pack("<Q", 1)))),
    "a string in an array that is not UTF-8": head(entry("k", ARRAY, array(STRING, 1, text(b"\xff")))),
    "bytes after the end": head(entry("k", U8, b"\0")) + bytes(64),
    "an alignment of 0": head(entry("general.alignment", U32, bytes(4))),
    "an alignment of 3": head(entry("general.alignment", U32, struct.pack("<I", 3))),
    "an alignment as a string": head(entry("general.alignment", STRING, text("32"))),
    "five dimensions": head(tensors=(tensor("t", (1,) * 5),), data=bytes(32)),
    "2^32 - 1 dimensions": head(tensors=(text("t") + struct.pack("<I", 2**32 - 1),), data=bytes(32)),
    "a shape that overflows": head(tensors=(tensor("t", (2**32, 2**32)),), data=bytes(32)),
    "a dimension that is negative": head(tensors=(tensor("t", (2**64 - 1, 0)),), data=bytes(32)),
    "a tensor past the end": head(tensors=(tensor("t", (9,)),), data=bytes(32)),
    "an offset past the end": head(tensors=(tensor("t", (1,), 99, 64),), data=bytes(32)),
    "an offset of 2^64 - 32": head(tensors=(tensor("t", (1,), 0, 2**64 - 32),), data=bytes(32)),
    "an offset that is not aligned": head(tensors=(tensor("t", (1,), 0, 4),), data=bytes(32)),
    "a tensor twice": head(tensors=(tensor("t", (1,)), tensor("t", (1,))), data=bytes(32)),
    "no data": head(tensors=(tensor("t", (1,)),)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_malformed_files_are_refused_in_one_line_that_names_the_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match="expected") as caught:
        read(tmp_path, HOSTILE[name])
    assert "file.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_43_byte_file_that_claims_2_to_the_63_elements_is_refused(tmp_path: Path) -> None:
    raw = head(entry("abc", ARRAY, array(U8, HUGE)))[:43]
    raw += bytes(43 - len(raw))
    with pytest.raises(FormatError):
        read(tmp_path, raw, wanted=False)


def test_a_file_of_many_gigabytes_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    path.write_bytes(head(tensors=(tensor("t", (2**20, 2**13)),)))
    with path.open("r+b") as file:
        file.truncate(2**36)
    assert read_gguf(path, lambda key: True).tensors[0].shape == (2**20, 2**13)


def test_a_tensor_type_of_the_future_is_kept_as_its_number(tmp_path: Path) -> None:
    assert read(tmp_path, head(tensors=(tensor("t", (1,), 999),), data=bytes(32))).tensors[0].type == 999


def test_a_hash_is_only_taken_of_an_array_of_strings(tmp_path: Path) -> None:
    for raw in (head(entry("t", U8, b"\0")), head(entry("t", ARRAY, array(U8, 1, b"\0")))):
        with pytest.raises(FormatError, match="array of strings"):
            read(tmp_path, raw, hashed="t")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(version=st.sampled_from([2, 3]), infos=st.integers(0, 3), keys=st.integers(0, 5), rest=st.binary(max_size=300))
@example(version=3, infos=0, keys=0, rest=b"")
def test_arbitrary_bytes_after_the_magic_are_read_or_refused(
    tmp_path: Path, version: int, infos: int, keys: int, rest: bytes
) -> None:
    for raw in (b"GGUF" + rest, struct.pack("<4sIQQ", b"GGUF", version, infos, keys) + rest):
        assert "file.gguf" in outcome(tmp_path, raw)


_TYPED = st.one_of(
    st.builds(entry, st.text(max_size=3), st.integers(0, 13), st.binary(max_size=20)),
    st.builds(
        lambda key, item, count, value: entry(key, ARRAY, array(item, count, value)),
        st.text(max_size=3), st.integers(0, 13), st.integers(0, 2**64 - 1) | st.integers(0, 4), st.binary(max_size=40),
    ),
    st.builds(lambda name, shape, kind: tensor(name, tuple(shape), kind), st.text(max_size=3),
              st.lists(st.integers(0, 2**64 - 1), max_size=5), st.integers(0, 50)),
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.lists(_TYPED, max_size=4), infos=st.integers(0, 2), wanted=st.booleans())
def test_files_of_almost_right_entries_are_read_or_refused(
    tmp_path: Path, entries: list[bytes], infos: int, wanted: bool
) -> None:
    raw = head(*entries, keys=max(0, len(entries) - infos), infos=infos)
    assert "file.gguf" in outcome(tmp_path, raw, wanted)


# --- model files ------------------------------------------------------------------------------------------------


def model(*more: bytes, architecture: str = "llama") -> bytes:
    sizes = {"block_count": 2, "embedding_length": 8, "context_length": 64}
    return head(
        entry("general.architecture", STRING, text(architecture)),
        *(entry(f"llama.{key}", U32, struct.pack("<I", size)) for key, size in sizes.items()),
        *more,
    )


def read_raw_model(folder: Path, raw: bytes) -> Any:
    path = folder / "model.gguf"
    path.write_bytes(raw)
    return read_model(path)


def test_a_model_states_its_sizes_template_and_tokens(tmp_path: Path) -> None:
    tokens = array(STRING, 2, text("a") + text("b"))
    found = read_raw_model(tmp_path, model(
        entry(TOKENS, ARRAY, tokens), entry("tokenizer.chat_template", STRING, text("{{ x }}")),
        entry("general.name", STRING, text("a\x1bb")), entry("small", ARRAY, array(U32, 2, struct.pack("<2I", 1, 2))),
        entry("large", ARRAY, array(U8, 5000, bytes(5000))),
    ))  # fmt: skip
    assert (found.block_count, found.embedding_length, found.context_length) == (2, 8, 64)
    assert found.chat_template == "{{ x }}"
    assert found.base.name == "a b"
    assert found.base.tokenizer_sha256 == hashlib.sha256(tokens[12:]).hexdigest()
    assert found.metadata["small"] == [1, 2]
    assert not {"large", TOKENS} & found.metadata.keys()


def test_a_model_without_name_template_or_tokens_says_so(tmp_path: Path) -> None:
    found = read_raw_model(tmp_path, model())
    assert (found.name, found.chat_template, found.tokenizer_sha256) == ("model", None, None)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (head(), "without general.architecture"),
        (head(entry("general.architecture", U8, b"\1")), "without general.architecture"),
        (model(architecture="edge-steer"), "steering file"),
        (model(entry("general.type", STRING, text("adapter"))), "'adapter'"),
        (model(entry("split.count", U32, struct.pack("<I", 3)), entry("split.no", U32, bytes(4))), "part 1 of 3"),
    ],
)  # fmt: skip
def test_what_is_not_one_whole_model_is_refused_with_the_reason(tmp_path: Path, raw: bytes, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        read_raw_model(tmp_path, raw)


def test_a_model_that_does_not_state_its_sizes_is_refused_when_they_are_asked_for(tmp_path: Path) -> None:
    found = read_raw_model(tmp_path, model(architecture="other"))
    with pytest.raises(FormatError, match=r"other\.block_count"):
        found.base  # noqa: B018


def test_what_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="No such file"):
        read_model(tmp_path / "absent.gguf")
    with pytest.raises(SteerError, match="a folder"):
        read_model(tmp_path)


def test_a_real_model_s_metadata_is_what_llama_cpp_reads(smollm2: Path) -> None:
    import llama_cpp

    found = read_model(smollm2)
    llama = llama_cpp.Llama(str(smollm2), vocab_only=True, verbose=False)
    compared = 0
    for key, shown in llama.metadata.items():
        mine = found.metadata.get(key)
        if isinstance(mine, bool):
            assert shown == str(mine).lower()
        elif isinstance(mine, str):
            assert shown == mine
        elif isinstance(mine, int | float):
            assert float(shown) == pytest.approx(mine, abs=1e-6)
        else:
            continue
        compared += 1
    assert compared >= 25
    assert (found.architecture, found.block_count, found.embedding_length) == ("llama", 30, 576)
    assert len(found.tensors) == 272
    tokens = gguf.GGUFReader(smollm2).fields[TOKENS].contents()
    raw = b"".join(struct.pack("<Q", len(token.encode())) + token.encode() for token in tokens)
    assert found.tokenizer_sha256 == hashlib.sha256(raw).hexdigest()
