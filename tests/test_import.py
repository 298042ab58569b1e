"""What others published becomes a steering that acts as theirs does; what is malformed or hostile becomes one line."""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from command import ran, run
from planted import random_steering

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny
import torch
from exports import TOKENS, assert_same, hook_logits, plain_logits

from edge_steer.architectures import architecture
from edge_steer.errors import FormatError, MismatchError, NoEffectError, SteerError
from edge_steer.export.control_vector import control_vector
from edge_steer.importing import import_steering
from edge_steer.model_file import read_model
from edge_steer.rotation import orthonormal
from edge_steer.sites import Site
from edge_steer.steering import Steering

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "reference"
LAYERS, WIDTH = tiny.LAYERS, tiny.WIDTH
GEMMA_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tiny.TinyModel:
    return tiny.build("llama", tmp_path_factory.mktemp("llama"))


def shell(path: Path, arch: str, layers: int = LAYERS, width: int = WIDTH) -> Path:
    """A GGUF that says what a model is, without weights."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("Shell")
    writer.add_block_count(layers)
    writer.add_embedding_length(width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def calibration(norms: tuple[str, ...] = GEMMA_NORMS, layers: int = LAYERS, width: int = WIDTH) -> dict[str, Any]:
    """What plane.pt holds, with every second layer steered; the plane as published, in bfloat16."""
    rng = np.random.default_rng(3)
    basis = torch.tensor(orthonormal(*rng.standard_normal((2, width)))).bfloat16()
    modules = [f"model.layers.{layer}.{norm}" for layer in range(layers) for norm in norms]
    mask = {module: int(module.split(".")[2]) % 2 == 1 for module in modules}
    return {
        "basis": (basis[0], basis[1]),
        "plane_type": "selective",
        "extra_info": {"target_layers": modules, "layer_steering_mask": mask},
    }


def published(folder: Path, found: Any = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(found if found is not None else calibration() | changes, folder / "plane.pt")
    return folder


# --- published calibrations -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"the published calibrations are not there: expected {PUBLISHED}")
@pytest.mark.parametrize(
    ("name", "arch", "layers", "width", "steered"),
    [
        ("Llama-3.2-1B-Instruct", "llama", 16, 2048, [4, *range(8, 16)]),
        ("Qwen2.5-1.5B-Instruct", "qwen2", 28, 1536, list(range(17, 28))),
    ],
)
def test_a_published_calibration_keeps_its_mask_its_sign_and_its_plane(
    name: str, arch: str, layers: int, width: int, steered: list[int], tmp_path: Path
) -> None:
    model = shell(tmp_path / "model.gguf", arch, layers, width)
    steering = import_steering(PUBLISHED / name, model)
    assert (steering.name, steering.operator, steering.plane) == (name, "selective", "global")
    assert steering.sites == architecture(arch).sites(layers)
    assert list(steering.steered) == [Site(layer, kind) for layer in steered for kind in ("attn_norm", "ffn_norm")]
    given = torch.load(PUBLISHED / name / "plane.pt", weights_only=True, map_location="cpu")["basis"]
    given = np.stack([vector.double().numpy() for vector in given])
    cosines = (steering.basis[0] * given).sum(1) / np.linalg.norm(given, axis=1)
    assert (cosines > 0.9999).all()
    assert np.abs(given @ given.T - np.eye(2)).max() > 1e-3, "what bfloat16 left of it"
    basis = steering.basis[0].astype(np.float64)
    assert np.abs(basis @ basis.T - np.eye(2)).max() < 1e-6
    assert np.isnan(steering.separation).all()
    assert np.isnan(steering.mean_norm).all()
    assert (steering.positive, steering.made.positive_count, steering.made.recorder) == ("harmful", 416, "published")
    assert steering.made.model.endswith(name)

    ran("import", PUBLISHED / name, "-m", model, "-o", tmp_path / "out.gguf")
    assert Steering.load(tmp_path / "out.gguf").fingerprint == steering.fingerprint


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_the_post_norms_of_gemma_are_kept_as_what_they_are(arch: str, tmp_path: Path) -> None:
    model = shell(tmp_path / "model.gguf", arch)
    steering = import_steering(published(tmp_path / "c") / "plane.pt", model, name="refusal")
    assert steering.sites == architecture(arch).sites(LAYERS, "all")
    assert steering.steered == tuple(
        Site(1, kind) for kind in ("attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm")
    )
    assert steering.name == "refusal"


def test_an_imported_calibration_steers_a_model_given_as_gguf_or_directory(
    llama: tiny.TinyModel, tmp_path: Path
) -> None:
    folder = published(tmp_path / "c", calibration(GEMMA_NORMS[:2]))
    steering = import_steering(folder, llama.gguf_path)
    assert steering.fingerprint == import_steering(folder, llama.hf_dir).fingerprint
    assert_same(
        hook_logits(llama.gguf_path, [(steering, 60.0)]),
        tiny.torch_logits(llama.hf_dir, TOKENS, [(steering, 60.0)]),
        tiny.torch_logits(llama.hf_dir, TOKENS),
    )


@pytest.mark.parametrize(("mode", "threshold"), [("standard", float("nan")), ("adaptive", 0.25)])
def test_other_modes_steer_every_site_as_published(mode: str, threshold: float, tmp_path: Path) -> None:
    found = calibration(GEMMA_NORMS[:2])
    del found["extra_info"]["layer_steering_mask"]
    folder = published(tmp_path / "c", found)
    (folder / "config.json").write_text(json.dumps({"steering": {"mode": mode, "threshold": 0.25}}))
    steering = import_steering(folder, shell(tmp_path / "model.gguf", "llama"))
    assert steering.operator == mode
    assert len(steering.steered) == 2 * LAYERS
    np.testing.assert_equal(steering.threshold, threshold)


@pytest.mark.parametrize(
    ("arch", "layers", "width", "both"),
    [
        ("gemma3", LAYERS, 2 * WIDTH, f"width is {WIDTH}.* is {2 * WIDTH}"),
        ("gemma3", LAYERS + 1, WIDTH, f"number of layers is {LAYERS}.* is {LAYERS + 1}"),
        ("llama", LAYERS, WIDTH, "steers 'model.layers.1.pre_feedforward_layernorm', which llama does not have"),
    ],
)
def test_a_calibration_for_another_model_is_refused_with_both_values(
    arch: str, layers: int, width: int, both: str, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match=both):
        import_steering(published(tmp_path / "c"), shell(tmp_path / "model.gguf", arch, layers, width))


def test_llama_s_norms_are_not_taken_for_those_of_gemma_that_have_their_names(tmp_path: Path) -> None:
    folder = published(tmp_path / "c", calibration(GEMMA_NORMS[:2]))
    with pytest.raises(MismatchError, match=r"norms is attn_norm, attn_post_norm, that of Shell is .*ffn_post_norm"):
        import_steering(folder, shell(tmp_path / "model.gguf", "gemma3"))


def test_directions_of_another_calibration_are_refused(tmp_path: Path) -> None:
    folder = published(tmp_path / "c")
    model = shell(tmp_path / "model.gguf", "gemma3")
    torch.save({"selected_direction": calibration()["basis"][0]}, folder / "directions.pt")
    import_steering(folder, model)
    torch.save({"selected_direction": calibration()["basis"][1]}, folder / "directions.pt")
    with pytest.raises(FormatError, match=r"directions.pt: expected the direction of plane.pt"):
        import_steering(folder, model)


# --- hostile files --------------------------------------------------------------------------------------------------


class Code:
    def __reduce__(self) -> Any:
        return (exec, (f"open({str(Path(__file__).with_name('ran-code'))!r}, 'w')",))


def nan_basis() -> Any:
    b1, b2 = calibration()["basis"]
    return (b1 * float("nan"), b2)


HOSTILE: dict[str, tuple[Callable[[], Any], str]] = {
    "code": (lambda: {"basis": Code()}, r"a pickle that asks for .*exec"),
    "a list": (lambda: [1], "dictionary as a published file, got list"),
    "no basis": (lambda: {"extra_info": {}}, "two vectors as 'basis', got nothing"),
    "one vector": (lambda: calibration() | {"basis": (torch.zeros(WIDTH),)}, "two vectors as 'basis', got tuple"),
    "a matrix": (lambda: calibration() | {"basis": torch.zeros(2, 4, WIDTH).unbind()}, r"vector as .*\(4, 64\)"),
    "integers": (lambda: calibration() | {"basis": [torch.ones(WIDTH, dtype=torch.int32)] * 2}, "expected a vector"),
    "numbers": (lambda: calibration() | {"basis": (1.0, 2.0)}, "expected a vector as .*got float"),
    "sparse": (lambda: calibration() | {"basis": [torch.ones(WIDTH).to_sparse()] * 2}, "expected a vector"),
    "claims 2^40": (lambda: calibration() | {"basis": [torch.ones(1).expand(1 << 40)] * 2}, "width is 1099511627776"),
    "no storage": (lambda: calibration() | {"basis": [torch.ones(WIDTH, device="meta")] * 2}, "expected a vector"),
    "NaN": (lambda: calibration() | {"basis": nan_basis()}, "expected finite values"),
    "zero": (lambda: calibration() | {"basis": [torch.zeros(WIDTH)] * 2}, "two vectors that are not zero"),
    "parallel": (lambda: calibration() | {"basis": [torch.ones(WIDTH)] * 2}, "two vectors that are not parallel"),
    "no extra": (lambda: {"basis": calibration()["basis"]}, "dictionary as extra_info, got nothing"),
    "empty extra": (lambda: calibration() | {"extra_info": {}}, "'layer_steering_mask' or 'target_layers'"),
    "mask of words": (
        lambda: calibration() | {"extra_info": {"layer_steering_mask": {"model.layers.0.input_layernorm": "yes"}}},
        "true or false",
    ),
    "names of numbers": (lambda: calibration() | {"extra_info": {"target_layers": [1]}}, "names of modules"),
    "a far layer": (
        lambda: calibration() | {"extra_info": {"target_layers": [f"model.layers.{'9' * 30}.input_layernorm"]}},
        "which gemma3 does not have",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_a_hostile_calibration_ends_in_one_line_and_nothing_written(kind: str, tmp_path: Path) -> None:
    make, match = HOSTILE[kind]
    folder, model = published(tmp_path / "c", make()), shell(tmp_path / "model.gguf", "gemma3")
    with pytest.raises(SteerError, match=match):
        import_steering(folder, model)
    found = run("import", folder, "-m", model, "-o", tmp_path / "out.gguf")
    assert found.exit_code == 1
    assert found.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "model.gguf"]
    assert not Path(__file__).with_name("ran-code").exists()


def test_files_that_are_cut_short_or_no_calibration_are_refused(tmp_path: Path) -> None:
    model = shell(tmp_path / "model.gguf", "gemma3")
    whole = (published(tmp_path / "c") / "plane.pt").read_bytes()
    rng = np.random.default_rng(0)
    broken = [whole[:size] for size in (0, 1, 100, len(whole) // 2, len(whole) - 10)]
    broken += [b"text", pickle.dumps({"basis": (1, 2)}), pickle.dumps(Code()), b"\x80\x02" + bytes(rng.bytes(200))]
    path = tmp_path / "broken.pt"
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(SteerError, match="expected"):
            import_steering(path, model)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", b"nothing of torch's")
    with pytest.raises(FormatError, match="expected a calibration of tensors"):
        import_steering(path, model)
    assert not Path(__file__).with_name("ran-code").exists()


def test_flipped_bytes_never_end_in_a_traceback(tmp_path: Path) -> None:
    model = shell(tmp_path / "model.gguf", "gemma3")
    whole = bytearray((published(tmp_path / "c") / "plane.pt").read_bytes())
    path, rng = tmp_path / "c" / "plane.pt", np.random.default_rng(1)
    refused = 0
    for _ in range(150):
        changed = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            changed[at] = rng.integers(256)
        path.write_bytes(changed)
        try:
            import_steering(path, model)
        except SteerError:
            refused += 1
    assert refused > 10


def test_sources_that_are_not_there_are_refused(tmp_path: Path) -> None:
    model = shell(tmp_path / "model.gguf", "gemma3")
    with pytest.raises(SteerError, match=r"cannot read .*gone"):
        import_steering(tmp_path / "gone", model)
    with pytest.raises(SteerError, match=r"cannot read .*plane.pt"):
        import_steering(tmp_path, model)
    with pytest.raises(SteerError, match="got a GGUF of architecture 'gemma3'"):
        import_steering(model, model)
    broken = published(tmp_path / "c")
    (broken / "metadata.json").write_text("{")
    with pytest.raises(FormatError, match=r"metadata.json: expected JSON"):
        import_steering(broken, model)


def test_an_output_that_exists_is_refused(tmp_path: Path) -> None:
    arguments = ["import", published(tmp_path / "c"), "-m", shell(tmp_path / "m.gguf", "gemma3"), "-o"]
    (tmp_path / "out.gguf").write_text("mine")
    assert "--force" in run(*arguments, tmp_path / "out.gguf").stderr
    assert (tmp_path / "out.gguf").read_text() == "mine"
    assert ran(*arguments, tmp_path / "out.gguf", "--force").stdout == f"{tmp_path / 'out.gguf'}\n"
    assert Steering.load(tmp_path / "out.gguf").name == "out"


# --- control vectors ------------------------------------------------------------------------------------------------


def vector_file(path: Path, directions: dict[str, Any], hint: str = "llama", arch: str = "controlvector") -> Path:
    """As repeng and llama.cpp's generator write them."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(directions))
    for name, values in directions.items():
        writer.add_tensor(name, np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def directions(layers: int = LAYERS, width: int = WIDTH) -> np.ndarray:
    """(layers − 1, d), of blocks 1 on, each of another length."""
    rng = np.random.default_rng(5)
    return (rng.standard_normal((layers - 1, width)) * np.arange(1, layers)[:, None]).astype(np.float32)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("scale", [1.0, -0.6])
def test_a_control_vector_gives_the_logits_that_llama_cpp_gives_with_it(
    family: str, scale: float, tmp_path: Path
) -> None:
    model = tiny.build(family, tmp_path)
    vector = directions()
    named = {f"direction.{layer}": values for layer, values in enumerate(vector, 1)}
    source = vector_file(tmp_path / "vector.gguf", named, family)
    ran("import", source, "-m", model.gguf_path, "-o", tmp_path / "steer.gguf")
    steering = Steering.load(tmp_path / "steer.gguf")
    assert (steering.operator, steering.default_dial()) == ("addition", 1.0)
    assert steering.sites == (Site(1, "layer_out"), Site(2, "layer_out"))
    np.testing.assert_allclose(steering.mean_norm, np.linalg.norm(vector, axis=1), rtol=1e-6)
    assert_same(
        hook_logits(model.gguf_path, [(steering, scale)]),
        plain_logits(model.gguf_path, vector=scale * vector),
        plain_logits(model.gguf_path),
    )


def test_a_control_vector_survives_export_and_import(llama: tiny.TinyModel, tmp_path: Path) -> None:
    file = read_model(llama.gguf_path)
    steering = random_steering(file.base, architecture("llama").sites(LAYERS, "layer_out"), "addition")
    back = import_steering(
        control_vector(llama.gguf_path, tmp_path / "v.gguf", [(steering, 0.4)]), llama.gguf_path, name=steering.name
    )
    assert back.sites == steering.sites
    np.testing.assert_allclose(back.basis, steering.basis, atol=1e-6)
    np.testing.assert_allclose(back.mean_norm, 0.4 * steering.mean_norm, rtol=1e-6)


def test_half_precision_and_blocks_without_a_direction_are_read(llama: tiny.TinyModel, tmp_path: Path) -> None:
    vector = directions().astype(np.float16)
    source = vector_file(tmp_path / "v.gguf", {"direction.1": 0 * vector[0], "direction.2": vector[1]}, "mistral")
    steering = import_steering(source, llama.gguf_path)
    assert steering.sites == (Site(2, "layer_out"),)
    np.testing.assert_allclose(steering.mean_norm[0] * steering.basis[0, 0], vector[1], rtol=1e-3)


ONE = directions()[0]


@pytest.mark.parametrize(
    ("named", "hint", "match"),
    [
        ({"direction.1": ONE[:32]}, "llama", f"width is 32, that of Tiny is {WIDTH}"),
        ({"direction.3": ONE}, "llama", "last block is 3, that of Tiny is 2"),
        ({"direction.1": ONE}, "qwen2", "architecture is qwen2, that of Tiny is llama"),
        ({"direction.0": ONE}, "llama", "expected tensors direction.1"),
        ({"direction.1x": ONE}, "llama", "expected tensors direction.1"),
        ({"weights": ONE}, "llama", "expected tensors direction.1"),
        ({"direction.1": ONE.reshape(2, 32)}, "llama", "of one dimension"),
        ({"direction.1": ONE.astype(np.float64)}, "llama", "as F32 or F16"),
        ({"direction.1": ONE * np.float32("nan")}, "llama", "finite values"),
        ({"direction.1": 0 * ONE}, "llama", "directions that are not zero"),
        ({}, "llama", "directions that are not zero"),
    ],
)
def test_a_control_vector_that_does_not_fit_is_refused(
    llama: tiny.TinyModel, named: dict[str, Any], hint: str, match: str, tmp_path: Path
) -> None:
    source = vector_file(tmp_path / "v.gguf", named, hint)
    with pytest.raises((FormatError, MismatchError, NoEffectError), match=match):
        import_steering(source, llama.gguf_path)
    assert run("import", source, "-m", llama.gguf_path, "-o", tmp_path / "out.gguf").exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["v.gguf"]


def test_a_control_vector_that_is_cut_short_is_refused(llama: tiny.TinyModel, tmp_path: Path) -> None:
    whole = vector_file(tmp_path / "v.gguf", {"direction.1": ONE}).read_bytes()
    for size in range(4, len(whole), 17):
        (tmp_path / "v.gguf").write_bytes(whole[:size])
        with pytest.raises(FormatError):
            import_steering(tmp_path / "v.gguf", llama.gguf_path)


def test_without_torch_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = published(tmp_path / "c"), shell(tmp_path / "model.gguf", "gemma3")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SteerError, match=r"pip install 'edge-steer\[torch\]'"):
        import_steering(folder, model)
