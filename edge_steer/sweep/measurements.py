"""What is measured at one position of the dials: each function runs the model and returns raw numbers, item by item.

Raw, because everything else is arithmetic on them: means and their errors, the half of the items on which a promise is
checked, figures thought of later. All values are plain lists and numbers, as they go to JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.measure.capability import score_options
from edge_steer.measure.divergence import ReferenceDistribution
from edge_steer.measure.evaluation_set import EvaluationSet
from edge_steer.measure.measured_model import set_dial
from edge_steer.measure.metrics import log_probabilities, log_softmax, pick_log_probabilities, plain_tokens, probe_gaps
from edge_steer.runtime.hook import Record
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.steering import Steering

RawMeasurement = dict[str, Any]


@dataclass
class ModelUnderTest:
    """A model with all steerings to be measured, what it is measured on, and what it expects of neutral text unsteered.

    The expectations are made when they are first needed and stay in memory, cut to the likeliest tokens.
    """

    llm: SteeredLlama
    evaluation_set: EvaluationSet
    _references: list[ReferenceDistribution] | None = None

    def set_dial(self, name: str | None, dial: float | None) -> None:
        """Turn the steering `name` to `dial` and all others off; None: all off."""
        set_dial(self.llm, name, dial)

    def references(self) -> list[ReferenceDistribution]:
        """What the unsteered model expects at every token of each passage."""
        if self._references is None:
            self.set_dial(None, None)
            self._references = [
                ReferenceDistribution.of(log_softmax(self.llm.logits(tokens, 1))) for tokens in self.passage_tokens()
            ]
        return self._references

    def passage_tokens(self) -> list[list[int]]:
        return [plain_tokens(self.llm, passage)[: self.llm.n_ctx()] for passage in self.evaluation_set.passages]


def measure_probes(model: ModelUnderTest, name: str | None, dial: float | None) -> RawMeasurement:
    """gaps: per probe, log-probability per token of its positive minus its negative answer."""
    model.set_dial(name, dial)
    return {"gaps": round_all(probe_gaps(model.llm, model.evaluation_set.probes))}


def measure_text(model: ModelUnderTest, name: str | None, dial: float | None) -> RawMeasurement:
    """Per passage: kl, the divergence from unsteered at each token, and log_p, each token's log-probability."""
    expected = model.references()
    model.set_dial(name, dial)
    kl, log_p = [], []
    for tokens, before in zip(model.passage_tokens(), expected, strict=True):
        now = log_softmax(model.llm.logits(tokens, 1))
        kl.append(round_all(before.divergence(now)))
        log_p.append(round_all(pick_log_probabilities(now, tokens[1:])))
    return {"kl": kl, "log_p": log_p}


def measure_questions(model: ModelUnderTest, name: str | None, dial: float | None) -> RawMeasurement:
    """scores: per question, the log-probability per token of each option, the answer first."""
    model.set_dial(name, dial)
    return {"scores": [round_all(each) for each in score_options(model.llm, model.evaluation_set.questions)]}


def measure_answers(model: ModelUnderTest, name: str | None, dial: float | None) -> RawMeasurement:
    """Per opening: tokens and text of the greedy answer, and log_p, its tokens' mean log-probability unsteered."""
    llm, prompts = model.llm, _opening_tokens(model)
    model.set_dial(name, dial)
    written = [_generate_greedily(llm, prompt, model.evaluation_set.answer_tokens) for prompt in prompts]
    model.set_dial(None, None)
    log_p = [
        float(log_probabilities(llm, [*prompt, *answer], len(prompt)).mean()) if answer else 0.0
        for prompt, answer in zip(prompts, written, strict=True)
    ]
    texts = [llm.detokenize(answer).decode(errors="replace").strip() for answer in written]
    return {"tokens": written, "texts": texts, "log_p": round_all(log_p)}


def measure_reading(model: ModelUnderTest, steering: Steering, written: Sequence[Sequence[int]]) -> RawMeasurement:
    """self_read: per answer, where the unsteered model stands along b1 as it reads what was written under steering.

    (h·b1)/mean ‖h‖, mean over the steered sites and over four places in the answer.
    """
    model.set_dial(None, None)
    found = []
    for prompt, answer in zip(_opening_tokens(model), written, strict=True):
        # From the end: what is cut from the cache is not needed again.
        ends = sorted({len(answer) * quarter // 4 for quarter in (1, 2, 3, 4)} - {0}, reverse=True)
        along = [_project_on_direction(model.llm, steering, [*prompt, *answer[:end]], False) for end in ends]
        found.append(float(np.mean(along)) if along else 0.0)
    return {"self_read": round_all(found)}


def measure_held_out(model: ModelUnderTest, steering: Steering, dial: float | None) -> RawMeasurement:
    """positive, negative: per held-out prompt of a class, (h·b1)/mean ‖h‖ at each steered site, under steering.

    Before the site's own turn: what the model makes of the turns below it.
    """
    model.set_dial(steering.name, dial)
    sides = {}
    for side in ("positive", "negative"):
        prompts = getattr(model.evaluation_set, side)
        texts = [model.llm.text_tokens(model.llm.chat_template.prompt_text(prompt)) for prompt in prompts]
        sides[side] = [round_all(_project_on_direction(model.llm, steering, tokens, True)) for tokens in texts]
    return sides


def _project_on_direction(
    llm: SteeredLlama, steering: Steering, tokens: Sequence[int], steered: bool
) -> NDArray[np.float64]:
    """(h·b1)/mean ‖h‖ of the last token at every steered site; NaN where the norm was not measured."""
    record = Record.zeros(len(llm.hook_sites), steering.base.embedding_length)
    llm.observe(tokens, record, steered=steered)
    where = {site: number for number, site in enumerate(llm.hook_sites)}
    h = record.rows[[where[site] for site in steering.steered], 0].astype(np.float64)
    b1 = steering.basis[steering.site_plane[steering.mask], 0]
    return np.asarray((h * b1).sum(-1) / steering.mean_norm[steering.mask])


def _opening_tokens(model: ModelUnderTest) -> list[list[int]]:
    return [model.llm.chat_tokens([{"role": "user", "content": opening}]) for opening in model.evaluation_set.openings]


def _generate_greedily(llm: SteeredLlama, prompt: Sequence[int], most: int) -> list[int]:
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


def round_all(values: Sequence[float] | NDArray[Any]) -> list[float]:
    """To 5 decimals, for a file that people read."""
    return [round(float(value), 5) for value in values]


MODEL_MEASUREMENTS: dict[str, Callable[[ModelUnderTest, str | None, float | None], RawMeasurement]] = {
    "probes": measure_probes, "text": measure_text, "questions": measure_questions, "answers": measure_answers,
}  # fmt: skip
