"""The command line, in this process and as one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from planted import random_steering

from edge_steer.architectures import architecture
from edge_steer.choices import Operator
from edge_steer.cli.main import main
from edge_steer.model_file import read_model
from edge_steer.steering import Steering

PROGRAM = [sys.executable, "-m", "edge_steer"]
ONE_THREAD = ["--threads", "1"]


def run(*args: object, input: str | bytes | None = None) -> Result:
    """`edge-steer ARGS`, in this process. Errors that are no exit propagate."""
    found = CliRunner().invoke(main, [str(arg) for arg in args], input=input)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def ran(*args: object, input: str | bytes | None = None) -> Result:
    """As `run`, for what must succeed."""
    found = run(*args, input=input)
    assert found.exit_code == 0, found.stderr
    return found


def process(*args: object, input: bytes = b"", **popen: Any) -> subprocess.CompletedProcess[bytes]:
    """`edge-steer ARGS` as a process."""
    command = [*PROGRAM, *map(str, args)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen
    return subprocess.run(
        command, input=input, env={**os.environ, "TERM": "xterm"}, timeout=300, check=False, **streams
    )


def steering_for(model: Path, operator: Operator = "selective", **kwargs: Any) -> Steering:
    """A random steering at every default site of a model."""
    file = read_model(model)
    return random_steering(file.base, architecture(file.architecture).sites(file.block_count), operator, **kwargs)
