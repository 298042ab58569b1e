"""`edge-steer serve --upstream` in front of an unmodified llama-server, against the hook: greedy answers at many dials.

    python tests/external/upstream.py --server PATH/TO/llama-server
    python tests/external/upstream.py --build       # compiles one from llama-cpp-python's own source first

Not part of the test run: compiling llama-server takes many minutes. Without either option it looks for llama-server on
the PATH; where there is none it says that nothing was tried and exits 77. Exits 1 where a check fails.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import httpx
import llama_cpp
from llama_server import build, free_port, running, write_f32

from edge_steer import SteeredLlama
from edge_steer.calibration import calibrate
from edge_steer.calibration.native_recorder import NativeRecorder
from edge_steer.export.lora import export_adapter, export_pair
from edge_steer.preset import load_preset
from edge_steer.runtime.answer import Sampling
from edge_steer.runtime.chat import generate_answer
from edge_steer.steering import Steering, save_all

PROMPTS = ("Write one sentence about the sea.", "How was your day?", "What do you think about the future?")
DIALS = (-12.0, -6.0, None, 6.0, 12.0)
GREEDY: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0}
LENGTH = 32
ONE_THREAD = ("-t", "1")
CHAT = "/v1/chat/completions"
Answers = dict[tuple[str, "float | None"], str]  # by prompt and dial


@contextmanager
def in_front(upstream: str, steering: Path) -> Iterator[tuple[httpx.Client, list[str]]]:
    """A client of our server as a process, and the notes that it began with."""
    port = free_port()
    command = [sys.executable, "-m", "edge_steer", "serve", "--upstream", upstream, "-s", str(steering)]
    with subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        notes: list[str] = []
        try:
            for line in process.stderr:
                if line.startswith("serving at"):
                    break
                notes.append(line.strip())
            if process.poll() is not None:
                raise click.ClickException(f"our server ended: {notes}")
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client:
                yield client, notes
        finally:
            process.terminate()


def messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def said(client: httpx.Client, prompt: str, **fields: Any) -> tuple[str, Any]:
    """An answer, and all that came with it."""
    body = {"messages": messages(prompt), "max_tokens": LENGTH, **GREEDY, **fields}
    found = client.post(CHAT, json=body).raise_for_status().json()
    return found["choices"][0]["message"]["content"].strip(), found


def streamed(client: httpx.Client, prompt: str, **fields: Any) -> tuple[str, list[Any]]:
    body = {"messages": messages(prompt), "max_tokens": LENGTH, "stream": True, **GREEDY, **fields}
    with client.stream("POST", CHAT, json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    assert lines[-1] == "[DONE]"
    return "".join(each["choices"][0]["delta"].get("content") or "" for each in chunks).strip(), chunks


class Checks:
    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, what: str, found: object, expected: object) -> None:
        right = found == expected
        self.failed += not right
        print(f"{'ok  ' if right else 'FAIL'} {what}" + ("" if right else f"\n     {found!r}\n     {expected!r}"))


def check_answers(check: Checks, client: httpx.Client, hook: Answers) -> None:
    """What is said is the hook's, in every way of asking."""
    for (prompt, dial), expected in hook.items():
        text, found = said(client, prompt, steering={"happy": dial})
        check(
            f"{dial if dial is None else f'{dial:+g}°'} {prompt}",
            (text, found["steering"]["happy"]),
            (expected, dial),
        )
    prompt = PROMPTS[0]
    check("by the model's name", said(client, prompt, model="any@happy:-12")[0], hook[prompt, -12.0])
    text, chunks = streamed(client, prompt, steering="happy:12")
    check("streamed", (text, chunks[0]["steering"]["happy"]), (hook[prompt, 12.0], 12.0))
    check("in one piece each token", len(chunks) > LENGTH // 2, True)
    asked = {"input": prompt, "max_output_tokens": LENGTH, "steering": "happy:-12", **GREEDY}
    output = client.post("/v1/responses", json=asked).raise_for_status().json()["output"]
    check("/v1/responses", output[-1]["content"][0]["text"].strip(), hook[prompt, -12.0])


def check_ablation(check: Checks, client: httpx.Client, hook: Answers) -> None:
    """An adapter of one dial beside the pair: on and off."""
    for dial in (1.0, None):
        text, found = said(client, PROMPTS[0], steering={"flat": dial})
        check(f"ablation {dial}", (text, found["steering"]["flat"]), (hook[PROMPTS[0], dial], dial))


def check_gone(check: Checks, client: httpx.Client) -> None:
    """A client that goes away in the middle of a stream frees its slot long before the answer would have ended.

    Of an answer in one piece llama-server itself does not always notice, asked without us neither; that our end closes
    is in tests/test_upstream.py.
    """
    body = {"messages": messages("Count to a thousand."), "max_tokens": 400, "ignore_eos": True, **GREEDY}
    token_ms = said(client, "Count to a thousand.")[1]["timings"]["predicted_per_token_ms"]
    with client.stream("POST", CHAT, json={**body, "stream": True}) as answer:
        next(answer.iter_lines())
    began = time.monotonic()
    while any(slot["is_processing"] for slot in client.get("/slots").json()):
        time.sleep(0.1)
    tokens = (time.monotonic() - began) * 1000 / token_ms
    check(f"a client that goes away frees its slot ({tokens:.0f} tokens' time)", tokens < 200, True)


def check_cache(check: Checks, client: httpx.Client, hook: Answers, kept: bool) -> None:
    """No dial answers from what another computed, and one dial's cache is used where it can be."""
    for dial in (12.0, -12.0, 12.0, None):
        for prompt in PROMPTS[:2]:
            asked = {"steering": {"happy": dial}, "id_slot": 0}
            check(f"after other dials: {dial} {prompt}", said(client, prompt, **asked)[0], hook[prompt, dial])
    _, found = said(client, PROMPTS[1], steering=None, id_slot=0)
    check("one dial's cache is used", found["timings"]["cache_n"] > 10, kept)


def hook_answers(model: Path, steering: Steering, dials: tuple[float | None, ...] = DIALS) -> Answers:
    f32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    llm = SteeredLlama(model, steering=steering, angle=None, n_ctx=512, n_threads=1, n_threads_batch=1, **f32)
    greedy = Sampling(max_tokens=LENGTH, repeat_penalty=1.0)
    found: Answers = {}
    for prompt in PROMPTS:
        for dial in dials:
            llm.angle = dial
            found[prompt, dial] = generate_answer(llm, messages(prompt), greedy).text.strip()
    llm.close()
    return found


@click.command()
@click.option("--server", type=click.Path(path_type=Path, exists=True), help="An unmodified llama-server.")
@click.option("--build", "compile_it", is_flag=True, help="Compile one.")
def main(server: Path | None, compile_it: bool) -> None:
    """SmolLM2-135M as F32 with the sentiment preset at its norms before attention."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        on_path = shutil.which("llama-server")
        server = server or (build(folder) if compile_it else Path(on_path) if on_path else None)
        if server is None:
            print("NOTHING WAS TRIED: no llama-server; give --server PATH, or --build", file=sys.stderr)
            sys.exit(77)
        model = write_f32(folder / "f32.gguf")
        made = calibrate(NativeRecorder(model, n_ctx=512), load_preset("sentiment"), name="happy")
        flat = made.with_(name="flat", operator="ablation", basis=made.basis[:, :1])
        happy, both = folder / "happy.gguf", folder / "both.gguf"
        made.with_(angle=8.0).save(happy)
        save_all([made.with_(angle=8.0), flat], both)
        cos, sin, _ = export_pair(model, folder / "x", made)  # the file's name tells nothing
        whole, _ = export_adapter(model, folder / "y", [(flat, 1.0)])
        hook = hook_answers(model, made)
        check = Checks()
        check("the dial changes what is said", len({hook[PROMPTS[0], dial] for dial in DIALS}) > 2, True)
        began = time.monotonic()
        with (
            running(server, model, (whole, sin, cos), *ONE_THREAD, "--cache-ram", "0") as upstream,
            in_front(upstream, both) as (client, notes),
        ):
            check("a server that stands well", ["adapters add" in each for each in notes], [True])
            check_answers(check, client, hook)
            check_ablation(check, client, hook_answers(model, flat, (1.0, None)))
            check_gone(check, client)
            check_cache(check, client, hook, kept=True)
        with ExitStack() as stack:
            upstream = stack.enter_context(running(server, model, (cos, sin), *ONE_THREAD))
            with in_front(upstream, happy) as (client, notes):
                check("a cache that mixes dials is told of", ["--cache-ram 0" in each for each in notes], [True])
                check_cache(check, client, hook, kept=False)
                stack.close()
                answer = client.post(CHAT, json={"messages": messages(PROMPTS[0])})
                error = answer.json()["error"]["code"]
                check("a lost server is one error", (answer.status_code, error), (502, "upstream_lost"))
    print(f"{check.failed} checks failed ({time.monotonic() - began:.0f} s)")
    sys.exit(check.failed > 0)


if __name__ == "__main__":
    main()
