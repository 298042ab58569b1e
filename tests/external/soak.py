"""Thousands of answers with everything changing: a long-lived context must stay as good as a fresh one, and as small.

    python tests/external/soak.py                              # the tiny random model, 2000 answers
    python tests/external/soak.py -m smollm2-135m --answers 300 --context 256

Angles, scopes, steerings, engines and prompts change at random; dials move during answers, states are saved and loaded,
the cache is reset, answers are abandoned. At random intervals the logits that the next answer starts from are compared
with those of a fresh context. Exits 1 where they differ by more than the tolerance, or where memory grows.

The tolerance is measured, not chosen. A prompt evaluated in other batches gives other roundings, and a quantized model
rounds activations to 8 bits, which makes steps of them: so prompts are first evaluated whole and cut in pieces, each in
a fresh context, and the tolerance is 3 times the largest difference seen, at least 2e-5 of the logits' range. What it
can catch is measured too: the difference that a single token makes that was cached under another dial.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import llama_cpp
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from planted import random_steering

from edge_steer import SteeredLlama, Steering
from edge_steer.architectures import architecture
from edge_steer.fetch import resolve
from edge_steer.model_file import read_model

EXACT: dict[str, Any] = {
    "type_k": llama_cpp.GGML_TYPE_F32,
    "type_v": llama_cpp.GGML_TYPE_F32,
    "n_threads": 1,
    "n_threads_batch": 1,
}
OPERATORS = {"hook": ("selective", "adaptive", "addition"), "lora": ("selective", "selective", "ablation")}
DIALS = {"selective": (-40, 40), "adaptive": (-180, 180), "addition": (-0.5, 0.5), "ablation": (1, 1)}
LEAST_TOLERANCE = 2e-5  # of the logits' range: float32 sums in another order, through every layer
MARGIN = 3
STATES_KEPT = 3
MOST_GROWTH = 16 << 20
MEMORY_EVERY = 10  # answers; collecting garbage takes longer than an answer of the tiny model

Logits = NDArray[np.float32]
Dials = dict[str, float | None]


@dataclass
class Model:
    """One engine's long-lived context, and how another is made like it."""

    path: Path
    engine: str
    context: int
    steerings: list[Steering]
    llm: SteeredLlama = field(init=False)
    states: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.llm = self.fresh(dict.fromkeys((each.name for each in self.steerings), None), "all")

    @property
    def held(self) -> int:
        """Bytes of the saved states, which are ours and no leak."""
        return sum(len(each.llama_state) + each.scores.nbytes + each.input_ids.nbytes for each in self.states)

    def fresh(self, dials: Dials, scope: Any) -> SteeredLlama:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random planes may overlap
            return SteeredLlama(
                self.path, steering=self.steerings, angles=dials, scope=scope, engine=self.engine, n_ctx=self.context,
                n_batch=64, n_ubatch=32, **EXACT,
            )  # fmt: skip


def first_logits(llm: SteeredLlama, prompt: list[int]) -> Logits:
    """What the first token of an answer to `prompt` is chosen from."""
    stream = llm.generate(prompt, temp=0.0)
    next(stream)
    logits = np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),)).copy()
    stream.close()
    return logits


def fresh_logits(model: Model, dials: Dials, scope: str, prompt: list[int], pieces: list[int] | None = None) -> Logits:
    """Those of a fresh context; evaluated in pieces that end at `pieces`, where they are given."""
    llm = model.fresh(dials, scope)
    try:
        for end in pieces or []:
            llm.eval(prompt[llm.n_tokens : end])
        return first_logits(llm, prompt)
    finally:
        llm.close()


def apart(one: Logits, other: Logits) -> float:
    """Largest difference, as a share of the logits' range."""
    return float(np.abs(one - other).max() / np.ptp(other))


class Draw:
    """Everything that is left to chance, from one seed."""

    def __init__(self, seed: int, vocabulary: int, context: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.vocabulary, self.context = vocabulary, context
        head = self.tokens(12)
        # Prompts of one head, of one batch, of several, and longer ones; none is the beginning of another.
        lengths = (4, 9, 20, 45, 90, context // 2)
        self.prompts = [[*head, *self.tokens(n)] for n in lengths] + [self.tokens(n) for n in lengths]

    def tokens(self, count: int) -> list[int]:
        return [int(token) for token in self.rng.integers(10, min(self.vocabulary, 250), count)]

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def prompt(self) -> list[int]:
        return self.prompts[self.rng.integers(len(self.prompts))]

    def dial(self, operator: str) -> float | None:
        """Off, one of a few that come again, or any."""
        low, high = DIALS[operator]
        if self.chance(0.35):
            return None
        return float(self.rng.choice([low, high])) if self.chance(0.5) else float(self.rng.uniform(low, high))

    def dials(self, model: Model) -> Dials:
        return {each.name: self.dial(each.operator) for each in model.steerings}


def tolerance(models: list[Model], draw: Draw, prompts: int) -> tuple[float, float]:
    """The tolerance, and the median difference that a first token makes which was evaluated unsteered."""
    noise, caught = [0.0], []
    for _ in range(prompts):
        for model in models:
            dials, prompt = draw.dials(model), draw.prompt()
            whole = fresh_logits(model, dials, "all", prompt)
            ends = sorted({int(end) for end in draw.rng.integers(1, len(prompt), 3)})
            noise.append(apart(fresh_logits(model, dials, "all", prompt, ends), whole))
            stale = model.fresh({name: None for name in dials}, "all")
            stale.eval(prompt[:1])
            stale.angles = dials
            stale.eval(prompt[1:])
            logits = np.ctypeslib.as_array(stale._ctx.get_logits_ith(-1), shape=(stale.n_vocab(),)).copy()
            if any(dial is not None for dial in dials.values()):
                caught.append(apart(logits, whole))
            stale.close()
    return max(LEAST_TOLERANCE, MARGIN * max(noise)), float(np.median(caught))


def answer(model: Model, draw: Draw, prompt: list[int]) -> list[int]:
    """One answer of a few tokens; its dials may move, and it may be abandoned."""
    llm, said = model.llm, []
    length = int(draw.rng.integers(1, 12))
    stream: Generator[int, Any, None] = llm.generate(prompt, temp=0.0 if draw.chance(0.5) else 1.0, top_k=20)
    for token in stream:
        said.append(token)
        if len(said) >= length or llm.n_tokens + 2 >= model.context:
            break
        if draw.chance(0.1):
            llm.angles = draw.dials(model)
    stream.close()
    return said


def step(model: Model, draw: Draw) -> None:
    """Change something, then answer."""
    llm = model.llm
    if draw.chance(0.7):
        llm.angles = draw.dials(model)
    if draw.chance(0.2):
        llm.scope = "response" if draw.chance(0.4) else "all"
    if draw.chance(0.05):
        llm.reset()
    if draw.chance(0.05):
        model.states = [*model.states[-STATES_KEPT + 1 :], llm.save_state()]
    if model.states and draw.chance(0.05):
        llm.load_state(model.states[draw.rng.integers(len(model.states))])
    if draw.chance(0.05):
        llm.logits([*draw.prompts[0], *draw.tokens(5)], len(draw.prompts[0]))
    said = answer(model, draw, draw.prompt())
    if draw.chance(0.4):  # the chat goes on
        more = [*llm.input_ids[: llm.n_tokens].tolist(), *said[-1:], *draw.tokens(5)]
        if len(more) + 16 < model.context:
            answer(model, draw, more)


def memory() -> int:
    """Bytes resident now; the most there ever were, where the system does not say.

    What is garbage is collected first (llama-cpp-python's samplers hold memory of llama.cpp's in a cycle), and the
    allocator gives back what it only keeps, where it can (glibc).
    """
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@click.command()
@click.option("-m", "--model", "name", default="", help="A GGUF or a known model; left out, a tiny random one.")
@click.option("--answers", default=2000, show_default=True)
@click.option("--every", default=10, show_default=True, help="Mean number of answers between two checks.")
@click.option("--context", default=512, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(name: str, answers: int, every: int, context: int, seed: int) -> None:
    """Print what was compared and what memory did."""
    with tempfile.TemporaryDirectory() as folder:
        path = resolve(name, fetch=True) if name else tiny_model(Path(folder))
        sys.exit(0 if soak(path, answers, every, context, seed) else 1)


def tiny_model(folder: Path) -> Path:
    import tiny

    return tiny.build("llama", folder).gguf_path


def soak(path: Path, answers: int, every: int, context: int, seed: int) -> bool:
    """Whether every comparison held and memory stayed flat; Ctrl-C ends it early."""
    file = read_model(path)
    sites = architecture(file.architecture).sites(file.block_count)
    models = [
        Model(path, engine, context, [
            random_steering(file.base, sites, operator, seed=10 * seed + number, name=f"s{number}")  # type: ignore[arg-type]
            for number, operator in enumerate(operators)
        ])
        for engine, operators in OPERATORS.items()
    ]  # fmt: skip
    draw = Draw(seed, models[0].llm.n_vocab(), context)
    most, stale = tolerance(models, draw, 8)
    print(f"{path.name}: tolerance {most:.1e} of the logits' range; one stale token makes {stale:.1e}")

    drift: list[float] = []
    resident: list[int] = []
    done, mismatches, started = 0, 0, time.monotonic()
    try:
        for number in range(answers):
            model = models[draw.rng.integers(len(models))]
            step(model, draw)
            if draw.chance(1 / every):
                prompt, dials, scope = draw.prompt(), dict(model.llm.angles), model.llm.scope
                drift.append(apart(first_logits(model.llm, prompt), fresh_logits(model, dials, scope, prompt)))
                if not drift[-1] <= most:
                    mismatches += 1
                    where = f"{model.engine}, {scope}, {dials}, {len(prompt)} tokens"
                    print(f"answer {number}, {where}: off by {drift[-1]:.1e}")
            done = number + 1
            if done % MEMORY_EVERY == 0:
                resident.append(memory() - sum(each.held for each in models))
            if done % 100 == 0:
                print(f"{done} answers, {resident[-1] / 1e6:.0f} MB", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: what follows is of the answers so far")
    if len(resident) < 4:
        return False

    half = len(resident) // 2  # the first half fills caches and what is kept of states
    slope = float(np.polyfit(MEMORY_EVERY * np.arange(half, len(resident)), resident[half:], 1)[0])
    quarters = np.array_split(np.array(resident[half:]), 2)
    growth = float(np.median(quarters[1]) - np.median(quarters[0]))
    flat, largest = growth <= MOST_GROWTH, max(drift, default=0)
    verdict = "flat" if flat else "GROWING"
    print(
        f"{done} answers in {time.monotonic() - started:.0f} s, {len(drift)} compared: "
        f"{mismatches} mismatches, largest difference {largest:.1e}, median {np.median(drift or [0]):.1e}\n"
        f"memory without saved states: {resident[0] / 1e6:.0f} MB at first, {max(resident) / 1e6:.0f} MB at most, "
        f"second half {slope:+.0f} bytes an answer, {growth / 1e6:+.1f} MB between its halves: {verdict}"
    )
    return flat and not mismatches and bool(drift)


if __name__ == "__main__":
    main()
