"""There is one ggml, and what lies on both sides of a boundary is compared before it is used."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny

from edge_steer import MismatchError, SteerError, ggml, tensor_types
from edge_steer.runtime import native

ONE_GGML = """
import sys
import numpy as np
from edge_steer import SteeredLlama, tensor_types
from edge_steer.runtime import rpc

llm = SteeredLlama(sys.argv[1], steering=(), n_ctx=256, n_threads=1, n_threads_batch=1)
llm.eval([256, 40, 50])
rpc._local_gpus()
kind = tensor_types.type_number("Q4_K")
written = tensor_types.from_float(kind, np.ones((2, 256), np.float32))
assert np.allclose(tensor_types.to_float(kind, written, 256), 1, atol=0.1)
with open("/proc/self/maps") as maps:
    print(*sorted({line.split()[-1] for line in maps if "/libggml-base" in line}), sep="\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hooking_and_quantizing_use_one_and_the_same_ggml(tmp_path: Path) -> None:
    model = tiny.build("llama", tmp_path).gguf_path
    found = subprocess.run([sys.executable, "-c", ONE_GGML, model], capture_output=True, text=True, check=True)
    assert len(found.stdout.splitlines()) == 1, found.stdout


def test_libraries_are_opened_in_two_places_only() -> None:
    package = Path(ggml.__file__).parent
    sources = {path.relative_to(package).as_posix(): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    found = {name for name, text in sources.items() if "CDLL(" in text or "load_shared_library" in text}
    assert found == {"ggml.py", "runtime/native.py"}


@pytest.mark.parametrize(("field", "offset"), [("_TYPE", 4), ("_BUFFER", 16)])
def test_a_changed_layout_of_tensors_is_noticed(monkeypatch: pytest.MonkeyPatch, field: str, offset: int) -> None:
    lib = ggml.base()
    monkeypatch.setattr(ggml, field, offset)
    with pytest.raises(MismatchError, match="lays its tensors out"):
        ggml._check_layout(lib)


@pytest.mark.parametrize(("field", "offset"), [("_OP_NUMBER", 84), ("_OP_PARAMS", 88), ("_SOURCES", 160)])
def test_a_changed_layout_of_nodes_is_noticed(monkeypatch: pytest.MonkeyPatch, field: str, offset: int) -> None:
    function = ctypes.cast(native.library().steer_in_graph, ctypes.c_void_p).value
    assert function is not None
    monkeypatch.setattr(ggml, field, offset)
    with pytest.raises(MismatchError, match="lays its tensors out"):
        ggml.custom_operator(function)


def test_a_function_that_ggml_lacks_is_named() -> None:
    with pytest.raises(MismatchError, match=r"expected a ggml with the function ggml_rotate, .*; pip install"):
        ggml.addresses(["ggml_nrows", "ggml_rotate"])


def test_a_type_of_another_size_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = tensor_types.type_number("Q4_K")
    monkeypatch.setitem(tensor_types._SIZES, kind, (128, 144))
    with pytest.raises(MismatchError, match=r"Q4_K in blocks of \(128, 144\) values and bytes, got \(256, 144\)"):
        tensor_types._traits.__wrapped__(kind)


# --- the native library ---------------------------------------------------------------------------------------------


def test_ggml_s_functions_are_bound_by_name() -> None:
    bound = native.bound_ggml()
    names = [each[0] for each in bound._fields_ if each[0].startswith("ggml_")]
    assert "ggml_nrows" in names
    assert {name: getattr(bound, name) for name in names} == ggml.addresses(names)


REPORTED = native._read_layouts(native.library())


@pytest.mark.parametrize("name", sorted(REPORTED))
def test_a_structure_that_drifted_is_refused(name: str) -> None:
    rows = REPORTED[name]
    native._structure(name, rows)
    last, (_, _, size) = rows[-2], rows[-1]
    swapped = [(rows[1][0], *rows[0][1:]), (rows[0][0], *rows[1][1:]), *rows[2:]]
    drifts = {
        "larger": [*rows[:-1], ("", 0, size + 8)],
        "one more": [*rows[:-1], ("more", size, 8), ("", 0, size + 8)],
        "one less": [*rows[:-2], rows[-1]],
        "moved": [*rows[:-2], (last[0], last[1] + 4, last[2]), rows[-1]],
        "of another size": [*rows[:-2], (*last[:2], last[2] + 1), rows[-1]],
        "gone": [],
    }
    if not rows[0][0].startswith("ggml_"):  # those take the library's order, whatever it is
        drifts["in another order"] = swapped
    for drift in drifts.values():
        with pytest.raises(MismatchError, match=f"expected struct {name} with .*; pip install . again"):
            native._structure(name, drift)


def test_a_reordered_function_is_bound_to_its_own_place() -> None:
    rows = REPORTED["steer_device_ggml"]
    swapped = [(rows[1][0], *rows[0][1:]), (rows[0][0], *rows[1][1:]), *rows[2:]]
    structure = native._structure("steer_device_ggml", swapped)
    assert [name for name, *_ in structure._fields_][:2] == [rows[1][0], rows[0][0]]


def test_a_structure_that_only_the_library_knows_is_refused() -> None:
    with pytest.raises(MismatchError, match="expected no struct steer_new_part"):
        native._structure("steer_new_part", [("", 0, 8)])


def test_another_abi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    with pytest.raises(MismatchError, match=rf"ABI {native.ABI}, found {native.ABI - 1}; pip install"):
        native.library.__wrapped__()


def test_a_library_that_is_not_built_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native.edge_steer, "__path__", [str(tmp_path)])
    with pytest.raises(SteerError, match="not built"):
        native._find()
