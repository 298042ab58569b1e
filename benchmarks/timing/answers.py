"""Whole answers, streamed as text, against a bare loop of llama_decode on the same context."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
from llama_cpp import Llama
from timing.decoding import Contexts
from timing.rounds import Row

from edge_steer.runtime.answer import Sampling
from edge_steer.runtime.chat import stream_answer

METRICS = {"token": "tokens/s"}
TOKENS = 128
CHAT = [{"role": "user", "content": "Write a long story about the keeper of a lighthouse and his daughter."}]
GREEDY = Sampling(max_tokens=TOKENS)
SAMPLED = Sampling(max_tokens=TOKENS, temperature=0.8, seed=1)
CHAIN = {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.1}  # as Sampling has them

Run = Callable[[], Mapping[str, float]]


def answer_rows(contexts: Contexts) -> list[Row]:
    """Seconds per token between an answer's first and its last, for ways to make it."""
    steered, plain, n = contexts.hooked, contexts.plain, len(contexts.every)
    prompt = steered.chat_tokens(CHAT)

    def bare(**chain: Any) -> Run:
        def run() -> Mapping[str, float]:
            with contexts.fields.null():
                return {"token": bare_loop(steered, prompt, chain)}

        return run

    def streamed(sampling: Sampling, *on: str) -> Run:
        def run() -> Mapping[str, float]:
            with contexts.on(*on):
                steered.reset()
                stream = stream_answer(steered, CHAT, sampling)
                while True:
                    try:
                        next(stream)
                    except StopIteration as end:
                        return {"token": 1 / end.value.tokens_per_second}

        return run

    def completed() -> Mapping[str, float]:
        with contexts.on("twenty"):
            steered.reset()
            parts = steered.create_chat_completion(CHAT, max_tokens=TOKENS, temperature=0.0, stream=True)
            return {"token": between(parts)}

    def generated(temperature: float) -> Run:
        def run() -> Mapping[str, float]:
            plain.reset()
            tokens = plain.generate(list(prompt), temp=temperature, **CHAIN)
            with closing(tokens):
                return {"token": between(token for token, _ in zip(tokens, range(TOKENS)))}  # noqa: B905

        return run

    base, sampler = "bare llama_decode and argmax", "bare llama_decode and llama.cpp's sampler chain"
    return [
        Row(base, bare()),
        Row("stream_answer, greedy, every dial off", streamed(GREEDY), base),
        Row("stream_answer, greedy, hook at 20 sites", streamed(GREEDY, "twenty"), base, {"token": 0.98}),
        Row(
            "stream_answer, greedy, hook at 20 sites, read", streamed(replace(GREEDY, read=("twenty",)), "twenty"),
            "stream_answer, greedy, hook at 20 sites", {"token": 0.98},
        ),
        Row(f"stream_answer, greedy, hook at all {n} sites", streamed(GREEDY, "every-0"), base),
        Row("create_chat_completion, greedy, streamed, hook at 20 sites", completed, base),
        Row("plain Llama.generate, greedy, tokens only", generated(0.0), base),
        Row("stream_answer, top-k and top-p, hook at 20 sites", streamed(SAMPLED, "twenty"), base, {"token": 0.95}),
        Row(sampler, bare(temp=0.8, **CHAIN), base),
        Row("plain Llama.generate, top-k and top-p, tokens only", generated(0.8), base),
    ]  # fmt: skip


def bare_loop(llm: Llama, prompt: list[int], chain: Mapping[str, Any]) -> float:
    """Seconds per token of the least that generates: decode, choose, again."""
    sampler = Llama._init_sampler(llm, **chain) if chain else None

    def choose() -> int:
        if sampler is not None:
            return int(sampler.sample(llm._ctx, -1))
        return int(np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),)).argmax())

    llm.reset()
    Llama.eval(llm, prompt)
    token = choose()
    begun = time.perf_counter()
    for position in range(len(prompt), len(prompt) + TOKENS - 1):
        llm._batch.set_batch([token], position, False)
        llm._ctx.decode(llm._batch)
        token = choose()
    return (time.perf_counter() - begun) / (TOKENS - 1)


def between(parts: Iterable[Any]) -> float:
    """Seconds from part to part, the first not counted."""
    moments = [time.perf_counter() for _ in parts]
    return (moments[-1] - moments[0]) / (len(moments) - 1)
