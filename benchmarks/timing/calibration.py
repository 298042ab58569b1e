"""Prompts recorded per second: natively, and with torch in batches and one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from llama_cpp import Llama
from timing.rounds import Row

from edge_steer.calibration.native_recorder import NativeRecorder
from edge_steer.calibration.sums import Recorder
from edge_steer.calibration.torch_recorder import TorchRecorder
from edge_steer.preset import load_preset, preset_names
from edge_steer.prompts import Prompt

METRICS = {"prompt": "prompts/s"}
PROMPTS = 50  # a round
BASELINE = "evaluated one by one, unsteered, shared beginnings once"

Run = Callable[[], Mapping[str, float]]


def prompts() -> list[Prompt]:
    """PROMPTS of the presets' prompts, from all of them."""
    every = [prompt for name in preset_names() for prompt in (load_preset(name).positive, load_preset(name).negative)]
    flat = [prompt for side in every for prompt in side]
    return flat[:: len(flat) // PROMPTS][:PROMPTS]


def recording_rows(path: Path, threads: int) -> list[Row]:
    """The native recorder against evaluating the same prompts in the same context."""
    recorder = NativeRecorder(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads)
    llm, asked = recorder._llm, prompts()

    def time_evaluation(*, sharing: bool) -> Run:
        def run() -> Mapping[str, float]:
            llm.reset()
            begun = time.perf_counter()
            for prompt in asked:
                tokens = llm.text_tokens(llm.chat_template.prompt_text(prompt))
                llm.keep(llm.shared(tokens[:-1]) if sharing else 0)
                Llama.eval(llm, tokens[llm.n_tokens :])
            return {"prompt": (time.perf_counter() - begun) / len(asked)}

        return run

    def record() -> Mapping[str, float]:
        llm.reset()
        return time_recording(recorder, asked)

    return [
        Row(BASELINE, time_evaluation(sharing=True)),
        Row("evaluated one by one, unsteered, each whole", time_evaluation(sharing=False), BASELINE),
        Row("native recorder, all sites", record, BASELINE, {"prompt": 0.9}),
    ]


def torch_recording_rows(folder: Path) -> list[Row]:
    """The torch recorder in batches, and one prompt at a time, as the published code records."""
    rows = []
    for size, what in ((16, "in batches of 16"), (1, "one by one, the published way")):
        recorder = TorchRecorder.load(folder, device="cpu", batch_size=size)
        rows.append(
            Row(f"torch recorder (float32), {what}", lambda one=recorder: time_recording(one, prompts()), BASELINE)
        )
    return rows


def time_recording(recorder: Recorder, asked: list[Prompt]) -> Mapping[str, float]:
    begun = time.perf_counter()
    recorder.sums(asked, lambda _: None)
    return {"prompt": (time.perf_counter() - begun) / len(asked)}
