"""Real clients of llama-cpp-python over a SteeredLlama, each by a script of its own in an environment of its own.

    python tests/external/clients/run.py                 # all
    python tests/external/clients/run.py outlines dspy   # some

A script passes where the client says what SteeredLlama itself says, at both ends of the dial and off, and three times
something else. Prints a table; exits 1 where a client fails. One that cannot be installed is skipped, and counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(HERE.parent))

from environment import beside  # noqa: E402

from edge_steer.fetch import resolve  # noqa: E402

SERVER = "llama-cpp-python[server]"
# A script with_NAME.py, and what it needs.
CLIENTS = {
    "langchain": ("langchain-community",),
    "outlines": ("outlines", "numba"),
    "guidance": ("guidance",),
    "instructor": ("instructor",),
    "llama_index": ("llama-index-llms-llama-cpp",),
    "dspy": ("dspy", SERVER),
    "server": ("openai", SERVER),
    "lmeval": ("lm-eval", SERVER),
}
MODEL = "smollm2-135m"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def calibrated(path: Path) -> Path:
    """The steering that the clients are given, measured once."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        command = ["calibrate", "-m", MODEL, "--preset", "sentiment", "-o", str(path)]
        subprocess.run([sys.executable, "-m", "edge_steer", *command], check=True)
    return path


def outcome(name: str, model: Path, steering: Path) -> tuple[str, str]:
    """works, fails or SKIPPED, and the client's row of the table."""
    packages = CLIENTS[name]
    try:
        python = beside(ROOT / "build" / "clients" / name, packages)
    except subprocess.CalledProcessError:
        return "SKIPPED", f"| {packages[0]} | | SKIPPED: pip could not install it | |"
    command = [str(python), str(HERE / f"with_{name}.py"), str(model), str(steering)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | OFFLINE)
    if ended.returncode:
        return "fails", f"| {packages[0]} | | FAILS | |"
    told = json.loads(ended.stdout.splitlines()[-1])
    glue = f"`{told['glue']}`" if told["glue"] else "none"
    return "works", f"| {told['package']} | {told['version']} | works | {glue} |"


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(CLIENTS)))
@click.option("-s", "--steering", type=click.Path(exists=True, path_type=Path), help="One that is there.")
def main(names: tuple[str, ...], steering: Path | None) -> None:
    """Ask a SteeredLlama through its clients."""
    steering = steering or calibrated(ROOT / "build" / "clients" / "happy.gguf")
    model = resolve(MODEL, fetch=True)
    found = []
    for name in names or CLIENTS:
        print(f"--- {name}", file=sys.stderr, flush=True)
        found.append(outcome(name, model, steering))
        print(found[-1][1], file=sys.stderr, flush=True)
    print("| client | version | result | glue |\n|---|---|---|---|", *(row for _, row in found), sep="\n")
    counts = {kind: sum(each == kind for each, _ in found) for kind in ("works", "fails", "SKIPPED")}
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()), file=sys.stderr)
    sys.exit(bool(counts["fails"]))


if __name__ == "__main__":
    main()
