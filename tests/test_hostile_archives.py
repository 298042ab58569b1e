"""Published calibrations made to hurt: no code runs, nothing is unpacked beyond what it looks like, and what torch
would take hours or gigabytes for is refused before torch sees it."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import numpy as np
import torch

from edge_steer.architectures import architecture
from edge_steer.errors import FormatError, SteerError
from edge_steer.importing.archive import check_archive
from edge_steer.importing.published import import_published
from edge_steer.importing.target import Target
from edge_steer.provenance import BaseModel
from edge_steer.steering import Steering

WIDTH, LAYERS = 8, 2
TARGET = Target(BaseModel("llama", "m", LAYERS, WIDTH), architecture("llama"))
MODULES = [
    f"model.layers.{layer}.{norm}"
    for layer in range(LAYERS)
    for norm in ("input_layernorm", "post_attention_layernorm")
]


def calibration(**changes: Any) -> dict[str, Any]:
    axes = torch.eye(WIDTH, dtype=torch.bfloat16)
    extra = {"target_layers": MODULES, "layer_steering_mask": dict.fromkeys(MODULES, True)}
    return {"basis": (axes[0].clone(), axes[1].clone()), "plane_type": "selective", "extra_info": extra, **changes}


def saved(folder: Path, found: Any = None) -> Path:
    torch.save(calibration() if found is None else found, folder / "plane.pt")
    return folder / "plane.pt"


def imported(path: Path) -> Steering:
    return import_published(path, TARGET, "x")


def archive(path: Path, data: bytes, kind: int = zipfile.ZIP_STORED, **more: bytes) -> Path:
    """An archive of torch's form around a pickle of one's own."""
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, content in {"data.pkl": data, "byteorder": b"little", "version": b"3\n", **more}.items():
            file.writestr(f"plane/{name}", content)
    return path


def test_what_torch_saves_passes(tmp_path: Path) -> None:
    shared = torch.ones(WIDTH)
    check_archive(saved(tmp_path, {"basis": (shared, shared), "names": ["a", "a", "a"], "more": {"again": shared}}))
    assert imported(saved(tmp_path)).steered


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_vectors_that_lay_on_a_gpu_are_read_without_one(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.serialization

    axes = torch.eye(WIDTH, dtype=dtype)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path = saved(tmp_path, calibration(basis=(axes[0].clone(), axes[1].clone())))
    assert b"cuda:0" in path.read_bytes()
    np.testing.assert_array_equal(imported(path).basis[0], np.eye(WIDTH)[:2])


# --- archives -------------------------------------------------------------------------------------------------------


def doubled(times: int) -> bytes:
    """A pickle of {tuple: 1}, whose tuple holds itself twice, `times` deep: its hash takes 2^times steps."""
    again = b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(times))
    return b"\x80\x02}(K\x01K\x01\x86q\x00" + again + b"tK\x01s."


def text(length: int) -> bytes:
    return b"\x80\x02X" + length.to_bytes(4, "little") + b"a" * length + b"."


def overlapping(path: Path) -> Path:
    """A directory that names one member again and again."""
    raw = archive(path, text(10_000)).read_bytes()
    start, end = raw.index(b"PK\x01\x02"), raw.index(b"PK\x05\x06")
    first = raw[start : raw.index(b"PK\x01\x02", start + 1)]
    count = 50
    tail = bytearray(raw[end:])
    tail[8:10] = tail[10:12] = count.to_bytes(2, "little")
    tail[12:16] = (len(first) * count).to_bytes(4, "little")
    path.write_bytes(raw[:start] + first * count + tail)
    return path


ARCHIVES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a bomb": (lambda path: archive(path, text(1 << 24), zipfile.ZIP_DEFLATED), "a compressed one"),
    "a compressed record": (
        lambda path: archive(path, text(1), zipfile.ZIP_BZIP2, **{"data/0": bytes(1 << 20)}), "a compressed one"
    ),
    "members that overlap": (overlapping, "members that overlap"),
    "a pickle of megabytes": (lambda path: archive(path, text(1 << 21)), "bytes of names"),
    "hours of hashing": (lambda path: archive(path, doubled(60)), "holds itself again"),
    "hours of hashing, written at length": (lambda path: archive(path, b"(tp0\ng0\ng0\n\x86."), "got (PUT|GET)"),
    "hours of hashing, by doubling": (lambda path: archive(path, b"\x80\x02)22\x86."), "got DUP"),
    "a later protocol": (lambda path: archive(path, pickle.dumps({"basis": 1}, protocol=5)), "protocol 2, got"),
    "a list in itself": (lambda path: archive(path, b"\x80\x02]q\x00h\x00a."), "holds itself again"),
    "no pickle": (lambda path: archive(path, b"\xff" * 50), "something else"),
    "a legacy file": (
        lambda path: torch.save(calibration(), path, _use_new_zipfile_serialization=False) or path, "something else"
    ),
    "a bare pickle": (lambda path: path.write_bytes(pickle.dumps({"basis": 1})) and path, "something else"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHIVES)
def test_what_would_be_more_than_it_looks_is_refused_before_torch_sees_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, why = ARCHIVES[kind]
    path = make(tmp_path / "plane.pt")
    monkeypatch.setattr(torch, "load", lambda *_args, **_more: pytest.fail("torch was asked to load it"))
    with pytest.raises(FormatError, match=why) as caught:
        imported(path)
    assert "\n" not in str(caught.value)


def test_every_length_of_a_published_file_is_refused_or_whole(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 13):
        path.write_bytes(whole[:length])
        with pytest.raises(SteerError) as caught:
            imported(path)
        assert "\n" not in str(caught.value)


# --- what is in them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [7, 30, 5000])
@pytest.mark.parametrize("digit", ["9", "٣"])
def test_a_layer_of_any_number_is_refused(tmp_path: Path, digits: int, digit: str) -> None:
    module = f"model.layers.{digit * digits}.input_layernorm"
    extra = {"target_layers": [*MODULES, module], "layer_steering_mask": dict.fromkeys([*MODULES, module], True)}
    with pytest.raises(SteerError, match="which llama does not have") as caught:
        imported(saved(tmp_path, calibration(extra_info=extra)))
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def configured(folder: Path, config: str) -> Path:
    """A calibration of another mode than `selective`, and what its config.json says of that."""
    (folder / "config.json").write_text(config)
    return saved(folder, calibration(extra_info={"target_layers": MODULES}))


@pytest.mark.parametrize("threshold", ["1" + "0" * 400, "1" + "0" * 5000, "1e999", "NaN", '"x"', "null", "[[[]]]"])
def test_a_threshold_that_is_no_number_is_refused(tmp_path: Path, threshold: str) -> None:
    how = '{"mode": "adaptive", "threshold": ' + threshold + "}"
    with pytest.raises(FormatError, match=r"threshold|expected JSON"):
        imported(configured(tmp_path, '{"steering": ' + how + "}"))


@pytest.mark.parametrize(
    "config", ["[]", '{"steering": []}', '{"steering": {"mode": []}}', '{"model": 1}', "[" * 10**5]
)
def test_a_configuration_of_another_shape_is_refused_in_one_line(tmp_path: Path, config: str) -> None:
    with pytest.raises(FormatError, match=r"config\.json") as caught:
        imported(configured(tmp_path, config))
    assert "\n" not in str(caught.value)


def test_names_and_counts_that_are_none_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"harmful_samples": -1, "harmless_samples": 1e400}')
    made = imported(configured(tmp_path, '{"model": {"name": 9}}')).made
    assert (made.model, made.positive_count, made.negative_count) == ("", 0, 0)
