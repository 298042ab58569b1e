"""PEFT adapters: the factors of `lora.py` from a Hugging Face directory's weights, for transformers and vLLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import SteerError
from edge_steer.export.folding import EMBEDDING, HEAD
from edge_steer.export.halves import check_adapter, core_at, halves
from edge_steer.export.hf_weights import read_checkpoint
from edge_steer.export.progress import Progress, no_progress
from edge_steer.export.readers import Dialled, linear_actions
from edge_steer.export.whole_folder import whole_folder
from edge_steer.safetensors_file import write_safetensors

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
    is 1. Raises SteerError if the steerings cannot be exact, or the weights are ones that PEFT cannot reach.
    """
    source, out = read_checkpoint(folder), Path(out)
    on, actions = linear_actions(steerings)
    folded = source.fold(on)
    check_adapter(folded, tied_is_fine=True)  # PEFT wraps the head alone, also where it shares the embedding's weight
    changed = {tensor: name for tensor, name in source.names.items() if name in folded.weights}
    for tensor, name in changed.items():
        if "experts" in tensor or name.endswith(("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")):
            raise SteerError(f"{tensor}: a PEFT adapter cannot reach routers and experts; use --to hf, lora or gguf")
    modules = {_module(tensor): (source.tensors[tensor], name) for tensor, name in changed.items()}
    if folded.untied:
        embedding = next(tensor for tensor, name in source.names.items() if name == EMBEDDING)
        modules[source.architecture.head] = (source.tensors[embedding], HEAD)
    core = core_at(actions)
    tensors: dict[str, NDArray[np.float32]] = {}
    with whole_folder(out, source.folder, force=force) as part, progress("reading weights", len(modules)) as step:
        for module, (weight, name) in modules.items():
            both = halves(name, folded.weights[name], weight.rows)
            stem = f"base_model.model.{module}"
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = both.a, both.lora_b(core)
            step(1)
        rank = max(len(each) for name, each in tensors.items() if name.endswith("lora_A.weight"))
        for module in modules:
            a, b = (f"base_model.model.{module}.lora_{half}.weight" for half in "AB")
            missing = rank - len(tensors[a])
            tensors[a] = np.pad(tensors[a], ((0, missing), (0, 0)))
            tensors[b] = np.pad(tensors[b], ((0, 0), (0, missing)))
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(folder),
            "inference_mode": True, "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none",
            "fan_in_fan_out": False, "target_modules": sorted(modules),
        }  # fmt: skip
        (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_safetensors(part / "adapter_model.safetensors", tensors)
    return out


def _module(tensor: str) -> str:
    """The module that holds a checkpoint's tensor; multimodal ones bear other names on disk than in transformers."""
    name = tensor.removesuffix(".weight")
    return f"model.language_model.{name[len(_OLD) :]}" if name.startswith(_OLD) else name
