"""What serving costs: tokens a second of a stream, and the time to its first token, beside the model alone and peers.

    python benchmarks/serving.py -s sentiment --results docs/results.md
    python benchmarks/serving.py --llama-server PATH          # with llama.cpp's own server beside
    python benchmarks/serving.py --rounds 1                   # quick

Each round asks everyone the same, one after another: an answer of TOKENS tokens, greedy; then two questions behind one
long system prompt, of which the second shows what is used again. Speeds are ratios to SteeredLlama alone in the same
round. `llama_cpp.server` wants `pip install 'llama-cpp-python[server]'`; what is not there is left out, and said.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import click
import httpx
from page import write_part

from edge_steer.fetch import resolve
from edge_steer.runtime.answer import Sampling, stream_pieces
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.sharing.find import find_steerings

TOKENS, CONTEXT = 96, 2048
QUESTION = "Tell me about the sea, in as many words as you like."
SYSTEM = "You are a guide in a small museum of clocks. " + " ".join(
    f"Clock {number} was made in {1700 + number} and shows {number % 12 + 1} o'clock." for number in range(40)
)
Ask = Callable[[list[dict[str, str]], int], tuple[float, float]]  # seconds to the first token, tokens a second after


@click.command()
@click.option("--models", default="smollm2-135m,qwen2.5-coder-0.5b", show_default=True)
@click.option("-s", "--steering", help="A steering that ships for all of them; served at its default.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--llama-server", type=click.Path(exists=True), help="llama.cpp's own server, to stand beside.")
@click.option("--results", type=click.Path(path_type=Path), help="Page to write the table to.")
def main(
    models: str, steering: str | None, rounds: int, threads: int, llama_server: str | None, results: Path | None
) -> None:
    """Measure, and print a table for each model."""
    text = head(steering, rounds, threads)
    for model in models.split(","):
        text += f"\n**{model}**\n\n{table(measure_model(model, steering, rounds, threads, llama_server))}"
    click.echo(text)
    if results:
        write_part(results, "serving.py", text)


def measure_model(
    model: str, steering: str | None, rounds: int, threads: int, llama_server: str | None
) -> dict[str, list[tuple[float, float, float]]]:
    path = str(resolve(model, fetch=True))
    with ExitStack() as stack:
        askers: dict[str, Ask] = {
            "SteeredLlama alone": stack.enter_context(alone(path, steering, threads)),
            "edge-steer serve": stack.enter_context(ours(path, steering, threads)),
        }
        if importlib.util.find_spec("starlette_context"):
            askers["llama_cpp.server, unsteered"] = stack.enter_context(llama_cpp_server(path, threads))
        else:
            click.echo("llama_cpp.server is left out: it is not installed", err=True)
        if llama_server:
            askers["llama-server, unsteered"] = stack.enter_context(llama_cpp_own(llama_server, path, threads))
        return measure(askers, rounds)


def measure(askers: dict[str, Ask], rounds: int) -> dict[str, list[tuple[float, float, float]]]:
    """For each: tokens a second, seconds to the first token behind a new long prompt, and behind the same again."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in askers}
    for round_ in range(rounds + 1):
        for name, ask in askers.items():
            _, speed = ask([{"role": "user", "content": QUESTION}], TOKENS)
            system = {"role": "system", "content": f"Visit {round_}. {SYSTEM}"}
            first, _ = ask([system, {"role": "user", "content": "Which clock is the oldest?"}], 2)
            again, _ = ask([system, {"role": "user", "content": "How many clocks are there?"}], 2)
            if round_:  # the first warms up
                found[name].append((speed, first, again))
    return found


def head(steering: str | None, rounds: int, threads: int) -> str:
    """What was measured, and how."""
    lines = [
        "## Speed of a server", "",
        f"`{re.sub('--llama-server [^ ]+', '--llama-server PATH', ' '.join(['python', *sys.argv]))}`", "",
        f"{threads} threads on {os.cpu_count()} cores, {rounds} rounds, "
        f"{'steered at the default' if steering else 'no steering'}. "
        "Medians; in brackets the lowest and the highest round. The client runs on the same cores. llama-server "
        "chooses flash attention, which llama-cpp-python leaves off: it makes short contexts faster, long ones slower.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def table(found: dict[str, list[tuple[float, float, float]]]) -> str:
    alone = found["SteeredLlama alone"]
    lines = [
        "| who | speed of a stream, SteeredLlama alone = 1 | first token behind a long prompt, s | the same again, s |",
        "|---|---|---|---|",
    ]
    for name, rows in found.items():
        ratios = sorted(row[0] / own[0] for row, own in zip(rows, alone, strict=True))
        first, again = (statistics.median(row[i] for row in rows) for i in (1, 2))
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}–{ratios[-1]:.3f})"
        lines.append(f"| {name} | {spread} | {first:.2f} | {again:.2f} |")
    return "\n".join(lines) + "\n"


# --- who is asked -----------------------------------------------------------------------------------------------------


@contextmanager
def alone(path: str, steering: str | None, threads: int) -> Iterator[Ask]:
    steerings = find_steerings(steering, path) if steering else []
    angles = {each.name: each.default_dial() for each in steerings}
    llm = SteeredLlama(
        path, steering=steerings, angles=angles, n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads
    )

    def ask(messages: list[dict[str, str]], most: int) -> tuple[float, float]:
        sampling = Sampling(max_tokens=most, repeat_penalty=1.0)
        begin = time.perf_counter()
        times = [time.perf_counter() for _ in stream_pieces(llm, llm.chat_tokens(messages), sampling)]
        return times[0] - begin, speed(times)

    yield ask
    llm.close()


@contextmanager
def ours(path: str, steering: str | None, threads: int) -> Iterator[Ask]:
    command = [sys.executable, "-m", "edge_steer", "serve", "-m", path, "-c", str(CONTEXT), "-t", str(threads)]
    with server([*command, *(["-s", steering] if steering else [])], "--port") as ask:
        yield ask


@contextmanager
def llama_cpp_server(path: str, threads: int) -> Iterator[Ask]:
    command = [
        sys.executable, "-m", "llama_cpp.server", "--model", path, "--n_ctx", str(CONTEXT), "--n_threads", str(threads),
        "--n_threads_batch", str(threads),
    ]  # fmt: skip
    with server(command, "--port") as ask:
        yield ask


@contextmanager
def llama_cpp_own(program: str, path: str, threads: int) -> Iterator[Ask]:
    with server([program, "-m", path, "-c", str(CONTEXT), "-t", str(threads), "-np", "1"], "--port") as ask:
        yield ask


@contextmanager
def server(command: Sequence[str], option: str) -> Iterator[Ask]:
    """Ask a server with OpenAI's interface that `command` starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*command, option, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(address, process)
        yield lambda messages, most: streamed(port, messages, most)
    finally:
        process.terminate()
        process.wait(30)


def wait_until_ready(address: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        try:
            if httpx.get(f"{address}/v1/models").status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None:
            raise click.ClickException(f"{process.args} ended at once")
        time.sleep(0.1)
    raise click.ClickException(f"{process.args} was not ready in a minute")


def streamed(port: int, messages: list[dict[str, str]], most: int) -> tuple[float, float]:
    """Ask as lightly as can be: lines are taken apart when the answer has ended, for the client shares the cores."""
    body: dict[str, Any] = {
        "messages": messages, "max_tokens": most, "temperature": 0, "repeat_penalty": 1.0, "stream": True,
    }  # fmt: skip
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    begin, lines = time.perf_counter(), []
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    while line := response.readline():
        lines.append((time.perf_counter(), line))
    connection.close()
    if response.status != 200:
        raise click.ClickException(f"a server answered {response.status}: {b''.join(line for _, line in lines)!r}")
    told = [(at, json.loads(line[6:])) for at, line in lines if line.startswith(b"data: {")]
    times = [at for at, chunk in told if chunk["choices"] and chunk["choices"][0]["delta"].get("content")]
    return times[0] - begin, speed(times)


def speed(times: Sequence[float]) -> float:
    """Tokens a second, from the first token to the last."""
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0


if __name__ == "__main__":
    main()
