"""Thousands of requests from many clients at once, each with dials and a seed of its own: every answer must be the one
that a fresh SteeredLlama gives, none may be lost, and memory must stay flat.

    python tests/external/serve_soak.py                       # 2,000 requests, 32 clients, a tiny model
    python tests/external/serve_soak.py --requests 20000
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import httpx

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny
from serving import chunks, fresh_answer, joined, server_process

CASES = 60


@click.command()
@click.option("--requests", default=2000, show_default=True)
@click.option("--clients", default=32, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(requests: int, clients: int, seed: int) -> None:
    """Ask, compare, and print what was found; exit 1 if an answer differs or is lost."""
    folder = Path(tempfile.mkdtemp())
    model = tiny.build("llama", folder).gguf_path
    chosen = random.Random(seed)
    cases = [random_case(chosen, number) for number in range(CASES)]
    expected = [fresh_answer(model, case) for case in cases]
    asked = [chosen.randrange(CASES) for _ in range(requests)]
    with server_process(model, folder) as (address, process):
        memory: list[int] = []
        begin = time.monotonic()
        found = asyncio.run(ask_all(address, [cases[each] for each in asked], clients, memory, process.pid))
        seconds = time.monotonic() - begin
    wrong = [number for number, (text, case) in enumerate(zip(found, asked, strict=True)) if text != expected[case]]
    half = max(memory[len(memory) // 2 :]) / max(memory[: max(len(memory) // 2, 1)])
    print(f"{requests} requests, {clients} clients, {seconds:.0f} s: {len(wrong)} answers differ from a fresh model's")
    print(f"memory: {memory[0]} kB at first, {memory[-1]} kB at last; second half : first half {half:.3f}")
    if wrong:
        raise SystemExit(1)


def random_case(chosen: random.Random, number: int) -> dict[str, Any]:
    """A request: a conversation, dials, and how it is sampled."""
    words = ("hello", "hello there", "the other", "in the end")
    turns = [chosen.choice(words) for _ in range(chosen.choice((1, 1, 3)))]
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)],
        "steering": {"happy": chosen.choice((None, -40, 7.5, 40)), "formal": chosen.choice((None, 30))},
        "seed": number, "temperature": chosen.choice((0, 1.3)), "max_tokens": chosen.choice((4, 12, 30)),
        "repeat_penalty": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0,
    }  # fmt: skip


async def ask_all(
    address: str, cases: list[dict[str, Any]], clients: int, memory: list[int], pid: int
) -> list[str | None]:
    """The answer to each case, of at most `clients` at once; notes the server's memory in kB as it goes."""
    turn = asyncio.Semaphore(clients)

    async def one(client: httpx.AsyncClient, number: int) -> str | None:
        async with turn:
            stream = number % 2 == 0
            found = await client.post("/v1/chat/completions", json={**cases[number], "stream": stream})
            if number % 50 == 0:
                memory.append(resident(pid))
            if found.status_code != 200:
                return None
            return joined(chunks(found.text)) if stream else found.json()["choices"][0]["message"]["content"]

    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        return await asyncio.gather(*(one(client, number) for number in range(len(cases))))


def resident(pid: int) -> int:
    """Memory that a process holds, in kB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


if __name__ == "__main__":
    main()
