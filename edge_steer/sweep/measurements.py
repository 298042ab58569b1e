"""The parts of a measurement: each runs the model at one position of the dials and returns raw numbers, item by item.

Raw, because everything else is arithmetic on them: means and their errors, the half of the items on which a promise is
checked, figures thought of later. All values are plain lists and numbers, as they go to JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.measure.capability import option_scores
from edge_steer.measure.divergence import Expected
from edge_steer.measure.evaluation_set import Material
from edge_steer.measure.measured_model import turn
from edge_steer.measure.metrics import chosen, log_probabilities, log_softmax, plain_tokens, probe_gaps
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.runtime.native import Record
from edge_steer.steering import Steering

Part = dict[str, Any]


@dataclass
class Bench:
    """A model with all steerings to be measured, what it is measured on, and what it expects of neutral text unsteered.

    The expectations are made when they are first needed and stay in memory, cut to the likeliest tokens.
    """

    llm: SteeredLlama
    material: Material
    _expected: list[Expected] | None = None

    def turn(self, name: str | None, dial: float | None) -> None:
        """Turn the steering `name` to `dial` and all others off; None: all off."""
        turn(self.llm, name, dial)

    def expected(self) -> list[Expected]:
        """What the unsteered model expects at every token of each passage."""
        if self._expected is None:
            self.turn(None, None)
            self._expected = [Expected.of(log_softmax(self.llm.logits(tokens, 1))) for tokens in self.passages()]
        return self._expected

    def passages(self) -> list[list[int]]:
        return [plain_tokens(self.llm, passage)[: self.llm.n_ctx()] for passage in self.material.passages]


def probes(bench: Bench, name: str | None, dial: float | None) -> Part:
    """gaps: per probe, log-probability per token of its positive minus its negative answer."""
    bench.turn(name, dial)
    return {"gaps": rounded(probe_gaps(bench.llm, bench.material.probes))}


def text(bench: Bench, name: str | None, dial: float | None) -> Part:
    """Per passage: kl, the divergence from unsteered at each token, and log_p, each token's log-probability."""
    expected = bench.expected()
    bench.turn(name, dial)
    kl, log_p = [], []
    for tokens, before in zip(bench.passages(), expected, strict=True):
        now = log_softmax(bench.llm.logits(tokens, 1))
        kl.append(rounded(before.divergence(now)))
        log_p.append(rounded(chosen(now, tokens[1:])))
    return {"kl": kl, "log_p": log_p}


def questions(bench: Bench, name: str | None, dial: float | None) -> Part:
    """scores: per question, the log-probability per token of each option, the answer first."""
    bench.turn(name, dial)
    return {"scores": [rounded(each) for each in option_scores(bench.llm, bench.material.questions)]}


def answers(bench: Bench, name: str | None, dial: float | None) -> Part:
    """Per opening: tokens and text of the greedy answer, and log_p, its tokens' mean log-probability unsteered."""
    llm, prompts = bench.llm, _opening_tokens(bench)
    bench.turn(name, dial)
    written = [_greedy(llm, prompt, bench.material.answer_tokens) for prompt in prompts]
    bench.turn(None, None)
    log_p = [
        float(log_probabilities(llm, [*prompt, *answer], len(prompt)).mean()) if answer else 0.0
        for prompt, answer in zip(prompts, written, strict=True)
    ]
    texts = [llm.detokenize(answer).decode(errors="replace").strip() for answer in written]
    return {"tokens": written, "texts": texts, "log_p": rounded(log_p)}


def reading(bench: Bench, steering: Steering, written: Sequence[Sequence[int]]) -> Part:
    """self_read: per answer, where the unsteered model stands along b1 as it reads what was written under steering.

    (h·b1)/mean ‖h‖, mean over the steered sites and over four places in the answer.
    """
    bench.turn(None, None)
    found = []
    for prompt, answer in zip(_opening_tokens(bench), written, strict=True):
        # From the end: what is cut from the cache is not needed again.
        ends = sorted({len(answer) * quarter // 4 for quarter in (1, 2, 3, 4)} - {0}, reverse=True)
        along = [_along(bench.llm, steering, [*prompt, *answer[:end]], False) for end in ends]
        found.append(float(np.mean(along)) if along else 0.0)
    return {"self_read": rounded(found)}


def held_out(bench: Bench, steering: Steering, dial: float | None) -> Part:
    """positive, negative: per held-out prompt of a class, (h·b1)/mean ‖h‖ at each steered site, under steering.

    Before the site's own turn: what the model makes of the turns below it.
    """
    bench.turn(steering.name, dial)
    sides = {}
    for side in ("positive", "negative"):
        prompts = getattr(bench.material, side)
        texts = [bench.llm.text_tokens(bench.llm.chat_template.prompt_text(prompt)) for prompt in prompts]
        sides[side] = [rounded(_along(bench.llm, steering, tokens, True)) for tokens in texts]
    return sides


def _along(llm: SteeredLlama, steering: Steering, tokens: Sequence[int], steered: bool) -> NDArray[np.float64]:
    """(h·b1)/mean ‖h‖ of the last token at every steered site; NaN where the norm was not measured."""
    record = Record.zeros(len(llm.hook_sites), steering.base.embedding_length)
    llm.observe(tokens, record, steered=steered)
    where = {site: number for number, site in enumerate(llm.hook_sites)}
    h = record.rows[[where[site] for site in steering.steered]].astype(np.float64)
    b1 = steering.basis[steering.site_plane[steering.mask], 0]
    return np.asarray((h * b1).sum(-1) / steering.mean_norm[steering.mask])


def _opening_tokens(bench: Bench) -> list[list[int]]:
    return [bench.llm.chat_tokens([{"role": "user", "content": opening}]) for opening in bench.material.openings]


def _greedy(llm: SteeredLlama, prompt: Sequence[int], most: int) -> list[int]:
    """Greedy, without a penalty on repetition: a penalty would hide what is measured."""
    written: list[int] = []
    most = min(most, llm.n_ctx() - len(prompt))
    for token in llm.generate(prompt, temp=0.0, repeat_penalty=1.0):
        if llm.piece(token) is None:
            break
        written.append(token)
        if len(written) >= most:
            break
    return written


def rounded(values: Sequence[float] | NDArray[Any]) -> list[float]:
    """To 5 decimals, for a file that people read."""
    return [round(float(value), 5) for value in values]


MODEL_PARTS: dict[str, Callable[[Bench, str | None, float | None], Part]] = {
    "probes": probes, "text": text, "questions": questions, "answers": answers,
}  # fmt: skip
