"""PEFT adapters: the factors of `lora.py` from a Hugging Face directory's weights, for transformers and vLLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import SteerError
from edge_steer.export.baked import weight_factors
from edge_steer.export.factors import Factor
from edge_steer.export.hf_weights import HfTensor, read_checkpoint, to_float32, write_safetensors
from edge_steer.export.progress import Progress, no_progress
from edge_steer.export.readers import Dialled, linear_actions
from edge_steer.export.whole_folder import whole_folder

_ROWS = 1 << 22
_OLD = "language_model.model."


def export_peft(
    folder: str | Path,
    out: str | Path,
    steerings: Sequence[Dialled],
    *,
    force: bool = False,
    progress: Progress = no_progress,
) -> Path:
    """Write a folder that `peft.PeftModel.from_pretrained` loads over the model in `folder`, at these dials.

    Every module has the rank of the whole, zero where fewer steerings act; lora_alpha is that rank, so that the scale
    is 1. Raises SteerError where the steerings cannot be exact, or the weights are ones that PEFT cannot reach.
    """
    source, out = read_checkpoint(folder), Path(out)
    on, _ = linear_actions(steerings)
    factors = weight_factors(steerings, source.readers(on))
    for name in factors:
        if "experts" in name or source.names[name].endswith(("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")):
            raise SteerError(f"{name}: a PEFT adapter cannot reach routers and experts; use --to hf, lora or gguf")
    rank = max(len(factor.span) for factor in factors.values())
    tensors: dict[str, NDArray[np.float32]] = {}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(folder), "inference_mode": True,
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "target_modules": sorted(map(_module, factors)),
    }  # fmt: skip
    with whole_folder(out, source.folder, force=force) as part, progress("reading weights", len(factors)) as step:
        for name, factor in factors.items():
            stem = f"base_model.model.{_module(name)}"
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = _adapter(
                source.tensors[name], factor, rank
            )
            step(1)
        (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_safetensors(part / "adapter_model.safetensors", tensors)
    return out


def _module(tensor: str) -> str:
    """The module that holds a checkpoint's tensor; multimodal ones bear other names on disk than in transformers."""
    name = tensor.removesuffix(".weight")
    return f"model.language_model.{name[len(_OLD) :]}" if name.startswith(_OLD) else name


def _adapter(tensor: HfTensor, factor: Factor, rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """lora_A (rank, d) and lora_B (m, rank) with lora_B lora_A = W R − W."""
    weight = tensor.memory(tensor.shard)
    at_once = max(1, _ROWS // weight.shape[1])
    blocks = (to_float32(weight[first : first + at_once]) for first in range(0, len(weight), at_once))
    product = np.concatenate([block @ factor.span.T.astype(np.float32) for block in blocks])
    missing = rank - len(factor.span)
    b = np.pad(product @ factor.core.astype(np.float32), ((0, 0), (0, missing)))
    return np.pad(factor.span.astype(np.float32), ((0, missing), (0, 0))), b
