"""GGUF adapters: the same steering on unmodified llama.cpp, exact because the operator is linear.

With W the weight dequantized from the very GGUF the adapter is for, and R = I + SᵀGS at the site it reads,
W R − W = (W Sᵀ) G S: lora_a = S, lora_b = (W Sᵀ) G. `adapter.lora.alpha` is 0: llama.cpp then takes a scale as given.
Letters: d model width, m outputs of a weight, E experts, r the sum of the steerings' ranks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from edge_steer.errors import SteerError
from edge_steer.export.factors import Stack, stack_at
from edge_steer.export.gguf_bytes import map_model, text, write_float32
from edge_steer.export.lora_notes import modelfile, notes
from edge_steer.export.progress import Progress, no_progress
from edge_steer.export.readers import Dialled, check_linear, check_model, linear_actions
from edge_steer.gguf_metadata import Value
from edge_steer.model_file import ModelFile, read_model
from edge_steer.rotation import Action
from edge_steer.sites import Site, architecture
from edge_steer.steering import RANK, Steering
from edge_steer.whole_file import whole_file

Float32s = NDArray[np.float32]
Core = Callable[[Site], NDArray[np.float64]]  # G (r, r) of a site


@dataclass(frozen=True)
class Products:
    """All that adapters of `steerings` need of a model, at any dial.

    products: W Sᵀ by weight, (m, r) or (E, m, r) float32. sites: the site each weight reads.
    stacks: S by site, and how the steerings follow each other there.
    """

    model: ModelFile
    steerings: tuple[Steering, ...]
    products: dict[str, Float32s]
    sites: dict[str, Site]
    stacks: dict[Site, Stack]


def products(model: ModelFile, steerings: Sequence[Steering], progress: Progress = no_progress) -> Products:
    """W Sᵀ of every weight that reads a steered site. Reads those weights once, some rows at a time.

    Raises SteerError where the steerings cannot be exact in an adapter for this model.
    """
    for steering in steerings:
        check_linear(steering)
    names = {tensor.name for tensor in model.tensors}
    arch = architecture(model.architecture, names)
    sites = check_model(steerings, model, arch)
    for name in sites:
        if name.replace(".weight", ".scale") in names:
            raise SteerError(f"{name} has a scale of its own, which llama.cpp's adapters do not know; use --to gguf")
    stacks = {site: stack_at(site, steerings) for site in set(sites.values())}
    source = map_model(model)
    found: dict[str, Float32s] = {}
    with progress("reading weights", len(sites)) as step:
        for tensor in model.tensors:
            if tensor.name in sites:
                span = stacks[sites[tensor.name]].span.astype(np.float32)
                product = np.concatenate([rows @ span.T for rows in source.blocks(tensor)])
                found[tensor.name] = product.reshape(*reversed(tensor.shape[2:]), -1, len(span))
                step(1)
    return Products(model, tuple(steerings), found, sites, stacks)


def adapter_tensors(source: Products, core: Core) -> Iterator[tuple[str, Float32s]]:
    """Names and values of an adapter's tensors: lora_a (r, d) and lora_b (m, r), or (E, r, d) and (E, m, r)."""
    cores = {site: core(site).astype(np.float32) for site in source.stacks}
    for name, product in source.products.items():
        site = source.sites[name]
        span = source.stacks[site].span.astype(np.float32)
        yield f"{name}.lora_a", np.broadcast_to(span, (*product.shape[:-2], *span.shape))
        yield f"{name}.lora_b", product @ cores[site]


def write_adapter(path: Path, source: Products, core: Core, description: str = "") -> None:
    """Write one adapter to `path`, over what is there."""
    metadata = {
        "general.architecture": text(source.model.architecture),
        "general.type": text("adapter"),
        "general.name": text(", ".join(steering.name for steering in source.steerings)),
        "general.description": text(description),
        "adapter.type": text("lora"),
        "adapter.lora.alpha": Value(GGUFValueType.FLOAT32, 0.0),
    }
    write_float32(path, metadata, dict(adapter_tensors(source, core)))


def at_actions(source: Products, actions: Sequence[Action | None]) -> Core:
    """G of each site for what the steerings of `source` do, in their order; None is off."""
    return lambda site: source.stacks[site].core(actions)


def live_adapter(llama_model: Any, source: Products, actions: Sequence[Action | None]) -> Any:
    """An adapter for a model that llama.cpp has loaded (its pointer), for scale 1; free it with
    llama_adapter_lora_free once no context uses it. The model keeps its memory map.

    Raises SteerError where llama.cpp refuses it.
    """
    import llama_cpp

    with tempfile.TemporaryDirectory(prefix="edge-steer-") as folder:
        path = Path(folder) / "live.gguf"
        write_adapter(path, source, at_actions(source, actions))
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
        write_adapter(adapter, source, at_actions(source, actions), _describe(dials))
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
        # R(θ) − I = (cosθ − 1) SᵀS + sinθ SᵀJS
        write_adapter(parts[0], source, lambda _: np.eye(2), f"{steering.name}: scale it by cos(angle) - 1")
        write_adapter(
            parts[1], source, lambda _: np.array([[0.0, -1.0], [1.0, 0.0]]), f"{steering.name}: scale it by sin(angle)"
        )
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
