"""guidance: it calls llama_decode on the context itself, so logits are compared, each decoded in the same pieces."""

import sys
import warnings
from typing import Any

import numpy as np
from guidance import gen
from guidance import models as guided
from steered import BEGINNING, GREEDY, pair, works

from edge_steer import SteeredLlama

Choices = list[tuple[int, float]]  # the likeliest token at each step, and its logit

models = pair(logits_all=True)
pieces: list[tuple[list[int], int]] = []  # tokens at each step, and how many of them were cached


def through() -> Choices:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of chat templates that guidance does not know
        # Made again at each turn of the dial: guidance keeps a list of its own of what is cached.
        model = guided.LlamaCpp(models.given, echo=False)
    engine = model._interpreter.engine
    get_logits, choices = engine.get_logits, []
    pieces.clear()

    def noting(token_ids: list[int], *args: Any, **kwargs: Any) -> Any:
        found = get_logits(token_ids, *args, **kwargs)
        choices.append(likeliest(found["logits"][-1]))
        pieces.append((list(token_ids), found["n_cached"]))
        return found

    engine.get_logits = noting
    text = (model + BEGINNING + gen("answer", max_tokens=GREEDY["max_tokens"], temperature=0.0))["answer"]
    print(repr(text), file=sys.stderr)
    return choices


def directly(own: SteeredLlama) -> Choices:
    choices = []
    for tokens, cached in pieces:
        own.n_tokens = min(cached, len(tokens) - 1)
        own.eval(tokens[own.n_tokens :])
        choices.append(likeliest(own.scores[len(tokens) - 1]))
    return choices


def likeliest(logits: np.ndarray) -> tuple[int, float]:
    return int(logits.argmax()), float(logits.max())


models.demand_same("gen", through, directly)
works("guidance", "models.LlamaCpp(llm) again after a turn of the dial")
