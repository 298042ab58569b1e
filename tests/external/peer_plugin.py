"""A plugin of pytest's for peer_suite.py: another Llama, and models of the registry in place of fetched ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import llama_cpp
import pytest
from planted import random_steering

from edge_steer import SteeredLlama
from edge_steer.architectures import architecture
from edge_steer.model_file import read_model

DIAL = {"off": None, "0": 0.0, "30": 30.0}
RUN = os.environ["PEER_RUN"]
MODELS: dict[str, str] = json.loads(os.environ["PEER_MODELS"])


class PeerLlama(SteeredLlama):
    """A Llama that brings a steering in random planes at all of the model's sites."""

    made: ClassVar[list[PeerLlama]] = []

    def __init__(self, model_path: str, **llama: Any) -> None:
        file = read_model(model_path)
        steering = random_steering(file.base, architecture(file.architecture).sites(file.block_count))
        super().__init__(model_path, steering=steering, angle=DIAL[RUN], **llama)
        self.made.append(self)


def fetched(repo_id: str, filename: str) -> str:
    if filename not in MODELS:
        pytest.skip(f"no model in place of {repo_id}/{filename}; give one by --model {filename}=PATH")
    return MODELS[filename]


huggingface_hub.hf_hub_download = fetched
if RUN != "plain":
    llama_cpp.Llama = PeerLlama

results: dict[str, str] = {}
counts = {"made": 0, "acted": 0}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    test = report.nodeid.split("::", 1)[-1]
    if report.when == "call" or report.outcome != "passed":
        results[test] = report.outcome


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Any:
    """Also demands that the steering acted in what a test evaluated where its dial is at an angle, and nowhere else."""
    PeerLlama.made.clear()
    outcome = yield
    for llm in PeerLlama.made:
        acted, should = llm.sites_hit > 0, bool(DIAL[RUN]) and llm.n_tokens > 0
        counts["made"] += 1
        counts["acted"] += acted
        assert acted == should, f"steering acted: {acted}, expected {should}"
    PeerLlama.made.clear()
    return outcome


def pytest_sessionfinish() -> None:
    Path(os.environ["PEER_REPORT"]).write_text(json.dumps({"results": results, **counts}))
