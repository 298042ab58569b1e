"""GGUF adapters: the same steering on unmodified llama.cpp, exact because the operator is linear.

Every weight that a folding changes takes a change of low rank, B core(dials) A: lora_a = A does not depend on the
dials, lora_b = B core does. W is dequantized from the very GGUF the adapter is for. `adapter.lora.alpha` is 0:
llama.cpp then takes a scale as given. Letters: d model width, m outputs of a weight, E experts, r rank.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from edge_steer.choices import RANK
from edge_steer.errors import SteerError
from edge_steer.export.adapter_label import COS, SIN, WHOLE, AdapterLabel, label
from edge_steer.export.factors import Actions, Floats
from edge_steer.export.folding import Reads, Writes, fold_gguf
from edge_steer.export.gguf_bytes import map_model, text, write_float32
from edge_steer.export.halves import Halves, check_adapter, core_at, halves
from edge_steer.export.lora_notes import modelfile, notes
from edge_steer.export.progress import Progress, no_progress
from edge_steer.export.readers import Dialled, check_linear, linear_actions
from edge_steer.gguf_metadata import Value
from edge_steer.model_file import ModelFile, read_model
from edge_steer.steering import Steering
from edge_steer.whole_file import whole_file

Float32s = NDArray[np.float32]
Core = Callable[[Reads | Writes], Floats]  # the core (r, r) of a weight


@dataclass(frozen=True)
class Products:
    """All that adapters of `steerings` need of a model, at any dial. turns: the most that one weight takes."""

    model: ModelFile
    steerings: tuple[Steering, ...]
    halves: dict[str, Halves]
    turns: int


def products(model: ModelFile, steerings: Sequence[Steering], progress: Progress = no_progress) -> Products:
    """The halves of every weight that changes. Reads those weights once, some rows at a time.

    Raises SteerError if the steerings cannot be exact in an adapter for this model.
    """
    for steering in steerings:
        check_linear(steering)
    source = map_model(model)
    folded = fold_gguf(steerings, source)
    check_adapter(folded)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    for name in folded.weights:
        if name.replace(".weight", ".scale") in tensors:
            raise SteerError(f"{name} has a scale of its own, which llama.cpp's adapters do not know; use --to gguf")
    found: dict[str, Halves] = {}
    with progress("reading weights", len(folded.weights)) as step:
        for name, part in folded.weights.items():
            tensor = tensors[name]
            experts = tensor.shape[2] if len(tensor.shape) == 3 else None
            found[name] = halves(name, part, partial(source.blocks, tensor), experts)
            step(1)
    return Products(model, tuple(steerings), found, folded.turns)


def adapter_tensors(source: Products, core: Core) -> Iterator[tuple[str, Float32s]]:
    """Names and values of an adapter's tensors: lora_a (r, in) and lora_b (m, r), or (E, r, in) and (E, m, r)."""
    for name, both in source.halves.items():
        yield f"{name}.lora_a", both.a
        yield f"{name}.lora_b", both.lora_b(core)


def write_adapter(
    path: Path, source: Products, core: Core, description: str = "", of: AdapterLabel | None = None
) -> None:
    """Write one adapter to `path`, over what is there."""
    metadata = {
        "general.architecture": text(source.model.architecture),
        "general.type": text("adapter"),
        "general.name": text(", ".join(steering.name for steering in source.steerings)),
        "general.description": text(description),
        "adapter.type": text("lora"),
        "adapter.lora.alpha": Value(GGUFValueType.FLOAT32, 0.0),
        **(of.metadata() if of else {}),
    }
    write_float32(path, metadata, dict(adapter_tensors(source, core)))


def live_adapter(llama_model: Any, source: Products, actions: Actions) -> Any:
    """An adapter for a model that llama.cpp has loaded (its pointer), for scale 1; free it with
    llama_adapter_lora_free once no context uses it. The model keeps its memory map.

    Raises SteerError if llama.cpp refuses it.
    """
    import llama_cpp

    with tempfile.TemporaryDirectory(prefix="edge-steer-") as folder:
        path = Path(folder) / "live.gguf"
        write_adapter(path, source, core_at(actions))
        adapter = llama_cpp.llama_adapter_lora_init(llama_model, str(path).encode())
    if not adapter:
        raise SteerError(f"llama.cpp refused the adapter for {source.model.path}; use the hook")
    return adapter


def export_adapter(
    model_path: str | Path,
    out: str | Path,
    steerings: Sequence[Dialled],
    *,
    force: bool = False,
    progress: Progress = no_progress,
) -> list[Path]:
    """Write one adapter for scale 1 with the steerings at these dials, and an Ollama Modelfile beside it."""
    on, actions = linear_actions(steerings)
    path = Path(f"{stem(out)}.gguf")
    ollama = path.with_suffix(".Modelfile")
    dials = [(steering, dial) for steering, dial in steerings if steering in on]
    with ExitStack() as files:
        adapter, model_file = (files.enter_context(whole_file(each, force=force)) for each in (path, ollama))
        source = products(read_model(model_path), on, progress)
        of = label(WHOLE, on[0], float(dials[0][1] or 0)) if len(on) == 1 else None
        write_adapter(adapter, source, core_at(actions), _describe(dials), of)
        model_file.write_text(modelfile(source.model.path, path), encoding="utf-8")
    return [path, ollama]


def export_pair(
    model_path: str | Path,
    out: str | Path,
    steering: Steering,
    *,
    force: bool = False,
    progress: Progress = no_progress,
) -> list[Path]:
    """Write the pair of adapters that gives one steering at any angle, scaled cosθ − 1 and sinθ, and how to use it."""
    check_linear(steering)
    if RANK[steering.operator] != 2:
        raise SteerError(f"steering {steering.name!r}: {steering.operator} has no angle; it is one adapter, not a pair")
    cos, sin, readme = (Path(f"{stem(out)}{ending}") for ending in ("-cos.gguf", "-sin.gguf", ".md"))
    with ExitStack() as files:
        parts = [files.enter_context(whole_file(each, force=force)) for each in (cos, sin, readme)]
        source = products(read_model(model_path), [steering], progress)
        if source.turns > 1:
            raise SteerError(
                f"steering {steering.name!r} turns the residual stream behind {len(steering.steered)} blocks, one "
                "after another, which no pair gives at every angle; give an angle (-s FILE:ANGLE), or calibrate one "
                "block (--layers)"
            )
        # R(θ) − I = (cosθ − 1) SᵀS + sinθ SᵀJS
        cos_core, sin_core = np.eye(2), np.array([[0.0, -1.0], [1.0, 0.0]])
        how = f"{steering.name}: scale it by"
        write_adapter(parts[0], source, lambda _: cos_core, f"{how} cos(angle) - 1", label(COS, steering))
        write_adapter(parts[1], source, lambda _: sin_core, f"{how} sin(angle)", label(SIN, steering))
        parts[2].write_text(notes(steering, source.model.path, cos, sin), encoding="utf-8")
    return [cos, sin, readme]


def stem(out: str | Path) -> str:
    """The output's path without `.gguf`."""
    return str(out).removesuffix(".gguf")


def _describe(dials: Sequence[Dialled]) -> str:
    return ", then ".join(
        f"{steering.name} ablated" if steering.operator == "ablation" else f"{steering.name} turned by {dial:g} degrees"
        for steering, dial in dials
    )
