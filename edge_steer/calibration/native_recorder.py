"""Recording on a GGUF, through the same hook that steers: no torch, and the directions fit that very quantization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.architectures import architecture
from edge_steer.calibration.sums import KEPT, ClassSums, Float64
from edge_steer.errors import SteerError
from edge_steer.model_file import read_model
from edge_steer.prompts import Prompt
from edge_steer.runtime.hook import Record
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.runtime.measuring import check_length
from edge_steer.runtime.together import SEQUENCES
from edge_steer.sites import OUTER_KINDS


class NativeRecorder:
    """A Recorder on llama.cpp. Prompts are evaluated unsteered, as many at once as fit into a batch."""

    name = "native"

    def __init__(self, model_path: str | Path, *, sites: str = "pre", **llama: Any) -> None:
        """llama: as for SteeredLlama (n_ctx, n_gpu_layers, n_threads …)."""
        file = read_model(model_path)
        kinds = architecture(file.architecture, (tensor.name for tensor in file.tensors)).kinds_for(sites)
        self.base = file.base
        self._llm = SteeredLlama(model_path, steering=(), sequences=SEQUENCES, **llama)
        self._at = [number for number, site in enumerate(self._llm.hook_sites) if site.kind in kinds]
        there = self._reached_sites()
        # Not every architecture names the stream or the norm before the head; then neither is a choice.
        self._at = [at for at in self._at if there[at] or self._llm.hook_sites[at].kind not in OUTER_KINDS]
        self.sites = tuple(self._llm.hook_sites[number] for number in self._at)
        self.uses_plain_template = self._llm.chat_template.is_plain

    def _reached_sites(self) -> list[bool]:
        """Which of all sites the model's graph has, from one token."""
        record = Record.zeros(len(self._llm.hook_sites), self.base.embedding_length)
        self._llm.observe([max(self._llm.token_bos(), 0)], record)
        return [bool(count) for count in record.count]

    @property
    def model(self) -> SteeredLlama:
        """The model that records, without steerings."""
        return self._llm

    def sums(self, prompts: Sequence[Prompt], step: Callable[[int], None]) -> ClassSums:
        """Float64 sums over the prompts' last tokens, (S, d)."""
        tokens = [self._tokens(prompt, number) for number, prompt in enumerate(prompts)]
        kept: list[NDArray[np.float32]] = []
        total = Record.zeros(len(self._llm.hook_sites), self.base.embedding_length)
        with closing(self._llm.observe_each(tokens)) as records:
            for record in records:
                total.add(record)
                rows = record.rows[self._at].swapaxes(0, 1)
                kept.append(rows[: max(KEPT - sum(map(len, kept)), 0)])
                step(len(rows))
        counts = total.count[self._at]
        if (counts != len(prompts)).any():
            site = self.sites[int(np.flatnonzero(counts != len(prompts))[0])]
            raise SteerError(
                f"expected {len(prompts)} activations at {site}, got {counts.min()}: this graph has no such tensor; "
                "run `edge-steer doctor -m MODEL` to see the sites it has"
            )
        return ClassSums(
            len(prompts), total.sum[self._at], total.sum_unit[self._at], total.sum_norm[self._at],
            np.concatenate(kept), self._sink(prompts[0]),
        )  # fmt: skip

    def _tokens(self, prompt: Prompt, number: int) -> list[int]:
        """The tokens of a prompt, whose number names it where its file does not. Raises SteerError for one too long."""
        tokens = self._llm.text_tokens(self._llm.chat_template.prompt_text(prompt))
        try:
            check_length(self._llm, tokens)
        except SteerError as error:
            raise SteerError(f"{prompt.origin or f'prompt {number + 1}'}: {error}") from None
        return tokens

    def _sink(self, prompt: Prompt) -> Float64:
        """(S, d) activations of a prompt's first token."""
        record = Record.zeros(len(self._llm.hook_sites), self.base.embedding_length)
        self._llm.observe(self._llm.text_tokens(self._llm.chat_template.prompt_text(prompt))[:1], record)
        return record.sum[self._at]

    def close(self) -> None:
        """Free the model."""
        self._llm.close()
