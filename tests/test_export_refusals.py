"""What cannot be exact is refused with its reason and place, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exports import steering_for, tinies
from planted import DIAL, random_steering

from edge_steer.architectures import architecture
from edge_steer.choices import Operator
from edge_steer.errors import MismatchError, NoEffectError, SteerError
from edge_steer.export.baked import bake_gguf
from edge_steer.export.control_vector import control_vector
from edge_steer.export.embedded import embed
from edge_steer.export.folding import folding
from edge_steer.export.hf import bake_hf
from edge_steer.export.lora import export_adapter, export_pair, products
from edge_steer.export.peft import export_peft
from edge_steer.model_file import read_model
from edge_steer.sites import Site

__all__ = ["tinies"]


def refused(folder: Path, match: str, export: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(SteerError, match=match):
        export(arguments[0], folder / "out.gguf", *arguments[1:], **options)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("operator", ["standard", "adaptive", "addition"])
def test_operators_that_are_not_linear(tinies: dict[str, Any], operator: Operator, tmp_path: Path) -> None:
    model = tinies["llama"]
    given = [(steering_for(model.gguf_path, operator), DIAL[operator])]
    for export in (bake_gguf, export_adapter):
        refused(tmp_path, f"blk.0.attn_norm: {operator}", export, model.gguf_path, given)
    for export in (bake_hf, export_peft):
        refused(tmp_path, f"blk.0.attn_norm: {operator}", export, model.hf_dir, given)
    refused(tmp_path, f"blk.0.attn_norm: {operator}", export_pair, model.gguf_path, given[0][0])


@pytest.mark.parametrize("sites", ["attn_post_norm", "ffn_post_norm", "layer_out"])
def test_sites_that_write_to_the_residual_stream(tinies: dict[str, Any], sites: str, tmp_path: Path) -> None:
    model = tinies["gemma3"]
    steering = steering_for(model.gguf_path, sites=sites)
    reason = "normalises what a block writes" if sites == "layer_out" else "writes to the residual stream"
    reason = rf"{steering.sites[0]}.*{reason}"
    for export in (bake_gguf, export_adapter):
        refused(tmp_path, reason, export, model.gguf_path, [(steering, 8)])
    for export in (bake_hf, export_peft):
        refused(tmp_path, reason, export, model.hf_dir, [(steering, 8)])


def test_steerings_that_are_off(tinies: dict[str, Any], tmp_path: Path) -> None:
    steering = steering_for(tinies["llama"].gguf_path)
    with pytest.raises(NoEffectError, match="off"):
        bake_gguf(tinies["llama"].gguf_path, tmp_path / "out.gguf", [(steering, 0), (steering, None)])


def test_a_steering_for_another_model(tinies: dict[str, Any], tmp_path: Path) -> None:
    steering = steering_for(tinies["llama"].gguf_path)
    for export, model in (
        (bake_gguf, tinies["qwen3"].gguf_path), (bake_hf, tinies["qwen3"].hf_dir), (embed, tinies["qwen3"].gguf_path),
    ):  # fmt: skip
        with pytest.raises(MismatchError, match="architecture is llama, the model's is qwen3"):
            export(model, tmp_path / "out", [(steering, 8)])
    assert not list(tmp_path.iterdir())


def no_norm(name: str) -> Any:
    raise AssertionError(f"{name} is not to be read")


@pytest.mark.parametrize(
    ("missing", "extra", "reason"),
    [
        ("blk.1.ffn_up_exps.weight", None, "blk.1.ffn_norm is read by .* ffn_up_exps is missing"),
        ("blk.2.ffn_gate_inp.weight", None, "blk.2.ffn_norm .* ffn_gate_inp is missing"),
        ("blk.0.attn_k.weight", None, "blk.0.attn_norm .* attn_k is missing"),
        (None, "blk.1.ffn_latent.weight", "blk.1.ffn_latent.weight reads blk.1"),
        (None, "blk.1.ffn_up.7.weight", "blk.1.ffn_up.7.weight reads blk.1"),
    ],
)
def test_readers_that_are_not_all_known(
    tinies: dict[str, Any], missing: str | None, extra: str | None, reason: str
) -> None:
    path = tinies["mixtral"].gguf_path
    names = {tensor.name for tensor in read_model(path).tensors} - {missing} | ({extra} if extra else set())
    with pytest.raises(SteerError, match=reason):
        folding([steering_for(path)], architecture("llama"), names, no_norm)


def test_an_architecture_whose_readers_are_not_known(tinies: dict[str, Any]) -> None:
    names = [tensor.name for tensor in read_model(tinies["llama"].gguf_path).tensors]
    with pytest.raises(SteerError, match=r"read blk\.0\.attn_norm in architecture granite are not known"):
        folding([steering_for(tinies["llama"].gguf_path)], architecture("granite"), names, no_norm)


def test_a_turned_stream_in_an_architecture_whose_readers_are_not_known(tinies: dict[str, Any]) -> None:
    model = read_model(tinies["llama"].gguf_path)
    steering = steering_for(tinies["llama"].gguf_path, sites="layer_out")
    names = {tensor.name for tensor in model.tensors}
    with pytest.raises(SteerError, match=r"blk\.1\.layer_out.*that read granite.s norms behind it are not known"):
        folding([steering], architecture("granite"), names, norm=lambda name: np.ones(model.embedding_length))


def test_a_checkpoint_without_one_of_its_experts(tinies: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((tinies["qwen2_moe"].hf_dir / "config.json").read_bytes())
    tensors = load_file(tinies["qwen2_moe"].hf_dir / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    steering = steering_for(tinies["qwen2_moe"].gguf_path)
    with pytest.raises(SteerError, match=r"expected 4 experts in blk\.1\.ffn_up_exps\.weight, found 3"):
        bake_hf(folder, tmp_path / "out", [(steering, 8)])
    assert not (tmp_path / "out").exists()


def test_experts_and_routers_through_peft(tinies: dict[str, Any], tmp_path: Path) -> None:
    steering = steering_for(tinies["mixtral"].gguf_path)
    refused(tmp_path, "PEFT adapter cannot reach", export_peft, tinies["mixtral"].hf_dir, [(steering, 8)])


def test_a_folder_that_is_no_model(tmp_path: Path, tinies: dict[str, Any]) -> None:
    steering = steering_for(tinies["llama"].gguf_path)
    with pytest.raises(SteerError, match=r"with config\.json"):
        bake_hf(tmp_path, tmp_path / "out", [(steering, 8)])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(SteerError, match="'mamba'"):
        bake_hf(tmp_path, tmp_path / "out", [(steering, 8)])
    (tmp_path / "config.json").write_text((tinies["llama"].hf_dir / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(SteerError, match="cut short"):
        bake_hf(tmp_path, tmp_path / "out", [(steering, 8)])


@pytest.mark.parametrize(
    "header",
    [
        "[]", "{", "null", '{"a": 1}', '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "I8", "shape": [99], "data_offsets": [0, 99]}}',
        '{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_shards_that_are_malformed(tinies: dict[str, Any], header: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tinies["llama"].hf_dir / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(16))
    with pytest.raises(SteerError, match=r"model\.safetensors: expected"):
        bake_hf(tmp_path, tmp_path / "out", [(steering_for(tinies["llama"].gguf_path), 8)])


def test_an_output_that_is_there_or_is_the_model(tinies: dict[str, Any], tmp_path: Path) -> None:
    model = tinies["llama"]
    given = [(steering_for(model.gguf_path), 8.0)]
    (tmp_path / "out.gguf").write_text("mine")
    (tmp_path / "out").mkdir()
    for export in (bake_gguf, export_adapter, embed):
        with pytest.raises(SteerError, match="--force"):
            export(model.gguf_path, tmp_path / "out.gguf", given)
    for export in (bake_hf, export_peft):
        with pytest.raises(SteerError, match="--force"):
            export(model.hf_dir, tmp_path / "out", given)
        with pytest.raises(SteerError, match="what is read"):
            export(model.hf_dir, model.hf_dir, given, force=True)
    for export in (bake_gguf, embed):
        with pytest.raises(SteerError, match="the model itself"):
            export(model.gguf_path, model.gguf_path, given, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.gguf"]
    assert (tmp_path / "out.gguf").read_text() == "mine"


def test_a_folder_that_is_there_is_replaced_whole_with_force(tinies: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    export_peft(tinies["llama"].hf_dir, out, [(steering_for(tinies["llama"].gguf_path), 8)], force=True)
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_export_leaves_nothing(tinies: dict[str, Any], tmp_path: Path) -> None:
    from contextlib import contextmanager

    @contextmanager
    def interrupting(what: str, total: int) -> Any:
        def step(steps: int) -> None:
            raise KeyboardInterrupt

        yield step

    model = tinies["llama"]
    given = [(steering_for(model.gguf_path), 8.0)]
    for export, source in ((bake_gguf, model.gguf_path), (bake_hf, model.hf_dir), (export_adapter, model.gguf_path)):
        with pytest.raises(KeyboardInterrupt):
            export(source, tmp_path / "out.gguf", given, progress=interrupting)
    assert not list(tmp_path.iterdir())


def test_a_control_vector_that_would_not_be_the_steering(tinies: dict[str, Any], tmp_path: Path) -> None:
    path = tinies["llama"].gguf_path
    refused(tmp_path, "a control vector adds", control_vector, path, [(steering_for(path), 8)])
    refused(tmp_path, "adds at blk.0.attn_norm", control_vector, path, [(steering_for(path, "addition"), 1)])
    first = random_steering(read_model(path).base, [Site(0, "layer_out")], "addition")
    refused(tmp_path, "no control vector for block 0", control_vector, path, [(first, 1)])
    refused(tmp_path, "off", control_vector, path, [(steering_for(path, "addition", "layer_out"), 0)])


def test_ablation_is_no_pair(tinies: dict[str, Any], tmp_path: Path) -> None:
    path = tinies["llama"].gguf_path
    refused(tmp_path, "ablation has no angle", export_pair, path, steering_for(path, "ablation"))
    assert products(read_model(path), [steering_for(path, "ablation")]).halves["blk.0.attn_q.weight"].b.shape == (64, 1)
