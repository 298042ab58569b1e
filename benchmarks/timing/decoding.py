"""Prompts and generation under every way to steer, on one model.

Contexts in one process differ by some percent for reasons of their own. So whatever can be toggled is toggled inside
one context: `unsteered` is the steered context with llama.cpp's callback fields set to null, `idle` the same with the
hook in place and every dial off. A plain second context is the control: it differs from `unsteered` by nothing but
being another one, and is the baseline of what is toggled in it.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import Llama
from numpy.typing import NDArray
from timing.rounds import Row

from edge_steer.architectures import architecture
from edge_steer.errors import NoEffectError
from edge_steer.export.baked import bake_gguf
from edge_steer.model_file import ModelFile, read_model
from edge_steer.rotation import Action, TurnBy, orthonormal
from edge_steer.runtime.engines import LoraEngine
from edge_steer.runtime.hook import Record
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.sites import Site
from edge_steer.steering import Steering

PROMPT, GENERATED = 512, 64
METRICS = {"prompt": f"prompt ({PROMPT}), tokens/s", "generation": f"generation ({GENERATED}), tokens/s"}
ANGLE = 8.0
STEERINGS = 8  # at every site
PLAIN, CONTROL = "unsteered", "control: a second context, unsteered"


def steering(model: ModelFile, sites: Sequence[Site], name: str, seed: int = 0) -> Steering:
    """A steering in random planes, one per site: which planes they are costs nothing."""
    rng = np.random.default_rng(seed)
    basis = [orthonormal(*rng.standard_normal((2, model.embedding_length))) for _ in sites]
    return Steering(
        name=name, operator="selective", plane="local", sites=tuple(sites), mask=np.ones(len(sites), np.bool_),
        site_plane=np.arange(len(sites), dtype=np.uint32), basis=np.stack(basis).astype(np.float32), base=model.base,
        class_means=np.tile([-1.0, 1.0], (len(sites), 1)),
    )  # fmt: skip


def site_sets(model: ModelFile) -> tuple[list[Site], list[Site]]:
    """20 sites spread over the network, and all; the first is never steered, all prompts agree there."""
    every = list(architecture(model.architecture).sites(model.block_count))[1:]
    return [every[int(i)] for i in np.linspace(0, len(every) - 1, 20)], every


def upper_half(model: ModelFile, sites: str) -> list[Site]:
    """The sites that calibration steers in the residual stream, or at all norms up to the head."""
    found = architecture(model.architecture).sites(model.block_count, sites)
    return [site for site in found if site.layer >= model.block_count // 2]


# --- one context, several conditions ------------------------------------------------------------------------------


class CallbackFields:
    """The two fields of a context's parameters that hold the hook, found by their values; null makes it plain.

    llama.cpp reads them whenever it builds a graph, so a change acts from the next prompt on.
    """

    def __init__(self, llm: SteeredLlama) -> None:
        self._hook = (llm._hook.callback, llm._hook.user_data)
        words = (ctypes.c_uint64 * 64).from_address(llm.ctx)
        at = [i for i in range(63) if (words[i], words[i + 1]) == self._hook]
        if len(at) != 1:
            raise SystemExit(f"expected the callback once at the head of llama.cpp's context, found it {len(at)} times")
        self._words, self._at = words, at[0]

    @contextmanager
    def null(self) -> Iterator[None]:
        self._words[self._at], self._words[self._at + 1] = 0, 0
        try:
            yield
        finally:
            self._words[self._at], self._words[self._at + 1] = self._hook


def evaluate(llm: Llama, tokens: Sequence[int]) -> None:
    """Evaluate tokens, and wait for a GPU to have done so."""
    Llama.eval(llm, tokens)
    llama_cpp.llama_synchronize(llm._ctx.ctx)


def timed(llm: Llama, before: Callable[[int], None] | None = None) -> dict[str, float]:
    """Seconds per token of a prompt, and of generating after it: the median over its tokens, what is done `before` each
    included."""
    prompt = [1000 + i for i in range(PROMPT)]
    llm.reset()
    evaluate(llm, prompt[:2])  # graphs are made anew where something was switched
    llm.reset()
    begun = time.perf_counter()
    evaluate(llm, prompt)
    evaluated = time.perf_counter() - begun
    spent = []
    for i in range(GENERATED):
        begun = time.perf_counter()
        if before:
            before(i)
        evaluate(llm, [2000 + i])
        spent.append(time.perf_counter() - begun)
    return {"prompt": evaluated / PROMPT, "generation": float(np.median(spent))}


class Contexts:
    """The contexts of one model and the rows that are timed in them."""

    def __init__(self, path: Path, threads: int, gpu_layers: int, stack: ExitStack) -> None:
        self.path = path
        self.model = read_model(path)
        self.twenty, self.every = site_sets(self.model)
        self.run = {"n_ctx": 1024, "n_threads": threads, "n_threads_batch": threads, "n_gpu_layers": gpu_layers,
                    "verbose": False}  # fmt: skip
        self.steerings = [
            steering(self.model, self.twenty, "twenty"),
            *(steering(self.model, self.every, f"every-{i}", 1 + i) for i in range(STEERINGS)),
            *(steering(self.model, upper_half(self.model, sites), sites, 4) for sites in ("layer_out", "norms")),
        ]
        dials = dict.fromkeys(self._names())
        self.hooked = SteeredLlama(path, steering=self.steerings, angles=dials, engine="hook", **self.run)
        self.plain = Llama(str(path), **self.run)
        self.fields = CallbackFields(self.hooked)
        self._stack = stack
        for llm in (self.hooked, self.plain):
            stack.callback(llm.close)
        try:
            with self.on(*self._names()), self.fields.null():
                Llama.eval(self.hooked, [1, 2, 3])  # another number than was evaluated before: a graph of its own
        except NoEffectError:  # as it must be without a callback
            return
        raise SystemExit("expected a context without callback to be unsteered, but the hook turned tokens")

    def _names(self) -> list[str]:
        return [each.name for each in self.steerings]

    @contextmanager
    def on(self, *names: str) -> Iterator[None]:
        """With these steerings on, through the hook; none is idle."""
        self.hooked.angles = {name: ANGLE if name in names else None for name in self._names()}
        self.hooked._engine.apply(self.hooked.angles.actions())
        try:
            yield
            self.hooked._engine.check()
        finally:
            self.hooked.angles = dict.fromkeys(self._names())
            self.hooked._engine.apply(self.hooked.angles.actions())

    def turned(self, *names: str) -> dict[str, float]:
        with self.on(*names):
            return timed(self.hooked)

    def unsteered(self) -> dict[str, float]:
        with self.fields.null():
            return timed(self.hooked)

    def read(self, *names: str) -> dict[str, float]:
        """With these on, one steering read at one site."""
        with self.on(*names), self.hooked.token_readings.of(["twenty"]):
            return timed(self.hooked)

    def recorded(self) -> dict[str, float]:
        self.hooked._hook.record(Record.zeros(len(self.hooked.hook_sites), self.model.embedding_length))
        try:
            return timed(self.hooked)
        finally:
            self.hooked._hook.record(None)

    def adapted(self, number: int) -> Callable[[], dict[str, float]]:
        """Steering `number` by the lora engine, in the plain context."""
        engine = LoraEngine(self.plain, self.model, [self.steerings[number]])
        self._stack.callback(engine.close)
        on: tuple[Action | None, ...] = (TurnBy(ANGLE),)

        def run() -> dict[str, float]:
            engine.apply(on)
            try:
                return timed(self.plain)
            finally:
                engine.apply((None,))

        return run

    def control_vector(self) -> dict[str, float]:
        """llama.cpp's own: one vector added at the output of every block but the first."""
        width, layers = self.model.embedding_length, self.model.block_count
        self._cvec(np.full((layers - 1, width), 1e-4, np.float32))
        try:
            return timed(self.plain)
        finally:
            self._cvec(None)

    def _cvec(self, values: NDArray[np.float32] | None) -> None:
        data = None if values is None else values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        size, last = (0, -1) if values is None else (values.size, self.model.block_count - 1)
        if llama_cpp.llama_set_adapter_cvec(self.plain.ctx, data, size, self.model.embedding_length, 1, last):
            raise SystemExit("llama.cpp refused the control vector")

    def baked(self) -> Llama:
        """A third context, on the model with the twenty sites folded in."""
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-steer-")))
        bake_gguf(self.path, folder / "baked.gguf", [(self.steerings[0], ANGLE)])
        llm = Llama(str(folder / "baked.gguf"), **self.run)
        self._stack.callback(llm.close)
        return llm

    def stream_rows(self, hook: float) -> list[Row]:
        """Turns of the residual stream, and of all norms up to the head, in the upper half as calibration has it."""
        limit = dict.fromkeys(METRICS, hook)
        return [
            Row(PLAIN, self.unsteered),
            Row(CONTROL, lambda: timed(self.plain), PLAIN),
            Row("hook, idle", self.turned, PLAIN, limit),
            *(
                Row(
                    f"hook, {sites}, {len(upper_half(self.model, sites))} sites",
                    partial(self.turned, sites),
                    PLAIN,
                    limit,
                )
                for sites in ("layer_out", "norms")
            ),
        ]

    def gpu_rows(self) -> list[Row]:
        """Every way to steer, with no share asked of any: how much a stop at a site costs is the GPU's to tell."""
        rows = [replace(row, limits={}) for row in self.stream_rows(0)]
        n, baked = len(self.every), self.baked()
        return [
            *rows,
            Row("one steering read, idle", self.read, PLAIN),
            Row(f"hook, all {n} sites", partial(self.turned, "every-0"), PLAIN),
            Row(
                f"hook, three steerings at all {n} sites", partial(self.turned, "every-0", "every-1", "every-2"), PLAIN
            ),
            Row("lora engine, 20 sites", self.adapted(0), CONTROL),
            Row("llama.cpp's control vector", self.control_vector, CONTROL),
            Row("baked, 20 sites", partial(timed, baked), PLAIN),
        ]

    def rows(self, hook: float, hook_all: float, *, brief: bool) -> list[Row]:
        """What is timed, with the least shares asked of the hook at 20 sites and beyond."""
        n = len(self.every)

        def both(share: float) -> dict[str, float]:
            return dict.fromkeys(METRICS, share)

        rows = [
            Row(PLAIN, self.unsteered),
            Row(CONTROL, lambda: timed(self.plain), PLAIN),
            Row("hook, idle", self.turned, PLAIN, both(0.995)),
            Row("one steering read, idle", self.read, PLAIN, both(0.98)),
            Row(f"hook, all {n} sites", lambda: self.turned("every-0"), PLAIN, both(hook_all)),
            Row(
                f"hook, three steerings at all {n} sites",
                lambda: self.turned("every-0", "every-1", "every-2"), PLAIN, both(hook_all),
            ),
            Row("lora engine, 20 sites", self.adapted(0), CONTROL, both(0.95)),
        ]  # fmt: skip
        if not brief:
            baked = self.baked()
            rows += [
                Row("hook, 20 sites", lambda: self.turned("twenty"), PLAIN, both(hook)),
                Row("recorder, all sites", self.recorded, PLAIN),
                Row(f"lora engine, all {n} sites", self.adapted(1), CONTROL),
                Row("llama.cpp's control vector", self.control_vector, CONTROL),
                Row("baked, 20 sites", lambda: timed(baked), PLAIN, both(0.995)),
            ]
        return rows
