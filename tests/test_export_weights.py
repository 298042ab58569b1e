"""Weights with a steering folded in are the hook, and all that no steered site reads stays byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from exports import ANGLES, TOKENS, assert_same, hook_logits, kl, plain_logits, steering_for, tinies

from edge_steer import tensor_types
from edge_steer.errors import SteerError
from edge_steer.export.baked import bake_gguf
from edge_steer.export.changes import Changes
from edge_steer.export.factors import stack_at
from edge_steer.export.folding import Reads, fold_gguf
from edge_steer.export.gguf_bytes import map_model
from edge_steer.export.hf import bake_hf
from edge_steer.model_file import ModelFile, read_model
from edge_steer.rotation import TurnBy
from edge_steer.safetensors_file import from_float32, to_float32
from edge_steer.sites import Site

FAMILIES = ["gemma2", "gemma3", "llama", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3"]
__all__ = ["tinies"]


def quantized(path: Path, out: Path, file_type: int) -> Path:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = file_type, 1
    assert llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), parameters) == 0
    return out


def tensor_bytes(model: ModelFile) -> dict[str, bytes]:
    source = map_model(model)
    return {tensor.name: source.bytes_of(tensor).tobytes() for tensor in model.tensors}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_baked_gguf_is_the_hook(tinies: dict[str, Any], family: str, tmp_path: Path) -> None:
    gguf_path = tinies[family].gguf_path
    steering = steering_for(gguf_path)
    unsteered = plain_logits(gguf_path)
    for angle in ANGLES:
        out = tmp_path / "baked.gguf"
        report = bake_gguf(gguf_path, out, [(steering, angle)], force=True)
        assert report.rounding == {"F32": 0.0}
        assert_same(plain_logits(out), hook_logits(gguf_path, [(steering, angle)]), unsteered)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_baked_hf_directory_is_the_hook(tinies: dict[str, Any], family: str, tmp_path: Path) -> None:
    import tiny

    model = tinies[family]
    one = steering_for(model.gguf_path, name="a")
    two = steering_for(model.gguf_path, "ablation", "attn_norm", seed=1, name="b")
    for number, actions in enumerate(([(one, -12.0)], [(two, 1.0), (one, 90.0)])):
        out = tmp_path / str(number)
        bake_hf(model.hf_dir, out, actions)
        assert_same(
            tiny.torch_logits(out, TOKENS),
            hook_logits(model.gguf_path, actions),
            tiny.torch_logits(model.hf_dir, TOKENS),
        )


def test_several_steerings_are_baked_in_their_order(tinies: dict[str, Any], tmp_path: Path) -> None:
    path = tinies["qwen2_moe"].gguf_path
    one, two = steering_for(path, name="a"), steering_for(path, seed=1, name="b")
    found = {}
    for order in ([(one, 60.0), (two, 80.0)], [(two, 80.0), (one, 60.0)]):
        out = tmp_path / f"{order[0][0].name}.gguf"
        bake_gguf(path, out, order)
        found[out.stem] = plain_logits(out)
        assert_same(found[out.stem], hook_logits(path, order))
    assert np.abs(found["a"] - found["b"]).max() > 0.1


def test_what_no_steered_site_reads_stays_byte_for_byte(tinies: dict[str, Any], tmp_path: Path) -> None:
    path = tinies["qwen2_moe"].gguf_path
    steering = steering_for(path, sites="ffn_norm")
    out = tmp_path / "baked.gguf"
    bake_gguf(path, out, [(steering, 20)])
    old, new = read_model(path), read_model(out)
    assert out.stat().st_size == path.stat().st_size
    assert out.read_bytes()[: old.data_start] == path.read_bytes()[: old.data_start]
    before, after = tensor_bytes(old), tensor_bytes(new)
    changed = {name.split(".", 2)[2] for name in before if before[name] != after[name]}
    assert changed == {
        "ffn_gate_inp.weight", "ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_gate_inp_shexp.weight",
        "ffn_gate_shexp.weight", "ffn_up_shexp.weight",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "file_type"), [("Q4_1", 3), ("Q8_0", 7), ("F16", 1)])
def test_a_quantized_model_keeps_its_types_and_says_what_rounding_cost(
    tinies: dict[str, Any], name: str, file_type: int, tmp_path: Path
) -> None:
    path = quantized(tinies["llama"].gguf_path, tmp_path / "q.gguf", file_type)
    steering = steering_for(path)
    report = bake_gguf(path, tmp_path / "baked.gguf", [(steering, 8)])
    old, new = read_model(path), read_model(tmp_path / "baked.gguf")
    assert new.tensors == old.tensors
    assert name in report.rounding
    assert report.rounding[name] < {"Q4_1": 0.1, "Q8_0": 0.01, "F16": 1e-3}[name]
    hook, baked = hook_logits(path, [(steering, 8)]), plain_logits(tmp_path / "baked.gguf")
    first_rounding = kl(plain_logits(tinies["llama"].gguf_path), plain_logits(path))
    assert kl(hook, baked) < 3 * first_rounding


def test_another_type_for_steered_weights_rounds_less(tinies: dict[str, Any], tmp_path: Path) -> None:
    path = quantized(tinies["mixtral"].gguf_path, tmp_path / "q.gguf", 3)
    steering = steering_for(path, sites="ffn_norm")
    report = bake_gguf(path, tmp_path / "baked.gguf", [(steering, 8)], steered_type="Q8_0")
    old, new = read_model(path), read_model(tmp_path / "baked.gguf")
    assert new.metadata == old.metadata
    types = {tensor.name: tensor_types.type_name(tensor.type) for tensor in new.tensors}
    assert types["blk.0.ffn_up_exps.weight"] == "Q8_0"
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"
    assert types["blk.0.attn_q.weight"] == "Q4_1"
    assert report.rounding["Q8_0"] < 0.01
    before, after = tensor_bytes(old), tensor_bytes(new)
    assert all(after[name] == before[name] for name in before if "attn" in name or "down" in name)
    hook, first_rounding = (
        hook_logits(path, [(steering, 8)]),
        kl(plain_logits(tinies["mixtral"].gguf_path), plain_logits(path)),
    )
    assert kl(hook, plain_logits(tmp_path / "baked.gguf")) < first_rounding / 3


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K",
                                  "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "TQ2_0"])  # fmt: skip
def test_rows_are_read_as_gguf_py_reads_them_and_written_back_close(name: str) -> None:
    kind = tensor_types.type_number(name)
    rows = np.random.default_rng(0).standard_normal((5, 512)).astype(np.float32)
    written = tensor_types.from_float(kind, rows)
    read = tensor_types.to_float(kind, written, 512)
    reference = gguf.quants.dequantize(written, gguf.GGMLQuantizationType(kind))
    assert np.abs(read - reference).max() <= 1e-6 * np.abs(reference).max()
    assert np.abs(read - rows).max() < {"TQ2_0": 4.0, "Q2_K": 2.0, "IQ3_S": 1.5, "Q3_K": 1.0}.get(name, 0.5)


def test_types_that_need_measured_importances_are_not_written() -> None:
    iq2 = int(gguf.GGMLQuantizationType.IQ2_XXS)
    with pytest.raises(SteerError, match="--steered-type Q8_0"):
        tensor_types.check_writable(iq2, 256, "blk.0.attn_q.weight")
    with pytest.raises(SteerError, match="multiple of 256"):
        tensor_types.check_writable(tensor_types.type_number("Q4_K"), 576, "blk.0.attn_q.weight")
    with pytest.raises(SteerError, match="weight type among"):
        tensor_types.type_number("Q4_K_M")


def test_bfloat16_rounds_to_nearest_even_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    bits = from_float32(values, np.dtype(np.uint16))
    assert (to_float32(bits) == expected.float().numpy()).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shards_keep_their_index_and_types(tinies: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from safetensors import safe_open

    source, out = tmp_path / "sharded", tmp_path / "steered"
    model = transformers.AutoModelForCausalLM.from_pretrained(tinies["mixtral"].hf_dir, dtype=getattr(torch, dtype))
    model.save_pretrained(source, max_shard_size="100KB")
    (source / "pytorch_model.bin").write_bytes(b"x")
    (source / "tokenizer.json").write_bytes((tinies["mixtral"].hf_dir / "tokenizer.json").read_bytes())
    steering = steering_for(tinies["mixtral"].gguf_path, sites="attn_norm")
    report = bake_hf(source, out, [(steering, 30)])
    assert report.weights == 9
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in out.iterdir()} == names - {"pytorch_model.bin"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    factors = {
        layer: Reads(stack_at(Site(layer, "attn_norm"), [steering])).factor([steering.action(30)]) for layer in range(3)
    }
    for name, shard in index["weight_map"].items():
        with safe_open(source / shard, "pt") as old, safe_open(out / shard, "pt") as new:
            before, after = old.get_tensor(name), new.get_tensor(name)
        assert after.dtype == before.dtype
        if any(each in name for each in ("q_proj", "k_proj", "v_proj")):
            turned = factors[int(name.split(".")[2])].turn(before.float().numpy())
            assert (after == torch.from_numpy(turned).to(before.dtype)).all()
        else:
            assert (after == before).all()


def test_a_folding_turns_experts_rows_and_leaves_the_rest(tinies: dict[str, Any]) -> None:
    source = map_model(read_model(tinies["mixtral"].gguf_path))
    steering = steering_for(source.model.path)
    changes = Changes(fold_gguf([steering], source), [TurnBy(30.0)], source.vector)
    weight = np.random.default_rng(0).standard_normal((24, 64)).astype(np.float32)
    assert "blk.0.ffn_down_exps.weight" not in changes
    turned = np.concatenate(list(changes.rows("blk.0.ffn_up_exps.weight", lambda: iter([weight[:7], weight[7:]]))))
    assert turned.dtype == np.float32
    assert np.abs(np.linalg.norm(turned, axis=-1) - np.linalg.norm(weight, axis=-1)).max() < 1e-4
