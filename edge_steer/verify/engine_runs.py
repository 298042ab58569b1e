"""Every engine that can do a steering, on the same text.

All have a float32 key/value cache, so that they differ by what they do and not by what a cache rounds.
Letters: n tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import MismatchError
from edge_steer.export.baked import bake_gguf
from edge_steer.export.readers import Dialled
from edge_steer.model_file import ModelFile
from edge_steer.preset import neutral_passages
from edge_steer.runtime.engines import EngineName
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.runtime.torch_hooks import steer
from edge_steer.steering import Steering

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class BakedRun:
    """Logits (n, V) of a model with steerings in its weights. undone: with the hook undoing them, where that was asked.

    rounding: what writing the weights in their types cost, by type, relative.
    """

    logits: Logits
    undone: Logits | None
    rounding: dict[str, float]


@dataclass(frozen=True)
class EngineRunner:
    """What is run and on what: a GGUF, a text of n + 1 tokens, parameters of llama_cpp.Llama.

    folder: for baked models, one at a time, and for logits: those of a large vocabulary are too much for memory.
    """

    model: ModelFile
    text: Sequence[int]
    folder: Path
    llama: dict[str, Any]
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @classmethod
    def open(cls, model: ModelFile, count: int, folder: Path, llama: dict[str, Any]) -> EngineRunner:
        """A runner whose text is the first `count` tokens of the neutral passages, and one more."""
        with closing(SteeredLlama(model.path, steering=(), **{**llama, "n_ctx": 256})) as llm:
            text = "\n\n".join(neutral_passages())
            tokens = list(llm.tokenize(text.encode(), add_bos=True, special=False))
        return cls(model, tokens[: min(count + 1, model.context_length)], folder, llama)

    def run(self, engine: EngineName, on: Sequence[Dialled], path: Path | None = None) -> Logits:
        """Logits (n, V) of the model, or of that at `path`, with the steerings `on` by the hook or as an adapter."""
        dials = {steering.name: dial for steering, dial in on}
        exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        with closing(
            SteeredLlama(
                path or self.model.path,
                steering=[steering for steering, _ in on],
                angles=dials,
                engine=engine,
                **{**self.llama, **exact, "n_ctx": -(-len(self.text) // 256) * 256},
            )
        ) as llm:
            return self._keep(llm.logits(self.text, 1))

    def run_baked(
        self, on: Sequence[Dialled], steered_type: str | None = None, undo: Sequence[Dialled] = ()
    ) -> BakedRun:
        """The model with the steerings folded into its weights, also with the hook applying `undo`."""
        path = self.folder / "baked.gguf"
        rounding = bake_gguf(self.model.path, path, on, steered_type=steered_type).rounding
        try:
            return BakedRun(self.run("hook", (), path), self.run("hook", undo, path) if undo else None, rounding)
        finally:
            path.unlink()

    def run_torch(self, hf: str | Path, on: Sequence[Dialled]) -> Iterator[Logits]:
        """Logits of the transformers model in the directory `hf`, in float32 on the CPU: steered, then unsteered."""
        from edge_steer.calibration.torch_recorder import TorchRecorder

        model = TorchRecorder.load(hf, device="cpu", dtype="float32").model
        import torch

        if max(self.text) >= model.get_input_embeddings().num_embeddings:
            raise MismatchError(f"expected the model of {self.model.path} in {hf}, got one with fewer tokens")
        ids = torch.tensor([list(self.text[:-1])])
        for dialled in (on, ()):
            with torch.inference_mode(), steer(model, dialled):
                logits = model(ids).logits[0].numpy()
            yield self._keep(logits)

    def _keep(self, logits: Logits) -> Logits:
        path = self.folder / f"{next(self._numbers)}.npy"
        np.save(path, logits)
        return np.asarray(np.load(path, mmap_mode="r"))


def inverse_steerings(on: Sequence[Dialled]) -> list[Dialled]:
    """The steerings that turn back what `on` turned; none where one of them cannot be undone."""
    in_stream = [{basis.tobytes() for basis in map(steering.basis_at, steering.steered)} for steering, _ in on
                 if any(site.kind == "layer_out" for site in steering.steered)]  # fmt: skip
    # In turned coordinates only turns of one plane are undone where they were done.
    several = len(in_stream) > 1 or any(len(planes) > 1 for planes in in_stream)
    if several or any(steering.operator != "selective" for steering, _ in on):
        return []
    return [(steering, -dial) for steering, dial in reversed(on) if dial is not None]


def identity_steering(on: Sequence[Dialled]) -> Dialled:
    """A whole turn at all sites of `on`: baked, it leaves every weight as it is, in the type asked for."""
    sites = sorted({site for steering, _ in on for site in steering.steered})
    base = on[0][0].base
    return Steering(
        name="identity",
        operator="selective",
        plane="global",
        sites=tuple(sites),
        mask=np.ones(len(sites), np.bool_),
        site_plane=np.zeros(len(sites), np.uint32),
        basis=np.eye(2, base.embedding_length, dtype=np.float32)[None],
        base=base,
    ), 360.0
