"""llama-cpp-python's own tests with SteeredLlama in place of Llama: its dial off, at 0 and at an angle.

    python tests/external/peer_suite.py

The tests come out of the source distribution of the llama-cpp-python that is installed, and run as they are, but for
the models: where they fetch one from Hugging Face they get one of the registry. They run four times, the first time on
the plain Llama. Prints a table; exits 1 where a result is other than the plain Llama's and EXPLAINED does not say why,
where EXPLAINED says what is no longer so, or where a steering did not act.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import click
from environment import beside

from edge_steer.fetch import resolve

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
RUNS = ("plain", "off", "0", "30")
VOCABULARY = "vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf"

# What the tests fetch, and which model of the registry they get.
MODELS = {
    "Qwen3.5-0.8B-Q8_0.gguf": "qwen2.5-coder-0.5b",
    "tinyllamas/stories15M-q4_0.gguf": "smollm2-135m",
}
# A word of a test's name, and why SteeredLlama does otherwise than Llama there, on purpose.
EXPLAINED = {
    "embeddings": "SteeredLlama refuses embedding=True",
    "recurrent": "SteeredLlama refuses an architecture whose sites it does not know",
    "hybrid": "SteeredLlama refuses an architecture whose sites it does not know",
}

Results = dict[str, str]  # a test: passed, failed or skipped


def downloaded(folder: Path) -> Path:
    """The source distribution of the llama-cpp-python that is installed."""
    wanted = f"llama-cpp-python=={version('llama-cpp-python')}"
    fetch = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", str(folder), wanted]
    subprocess.run([sys.executable, "-m", "pip", *fetch], check=True, stdout=sys.stderr)
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def unpacked(sdist: Path, folder: Path) -> Path:
    """Its tests and what they read, without the rest of it."""
    with tarfile.open(sdist) as archive:
        (top,) = {member.name.split("/")[0] for member in archive.getmembers()}
        own = [m for m in archive if m.name.startswith(f"{top}/tests/") or m.name == f"{top}/{VOCABULARY}"]
        archive.extractall(folder, own, filter="data")
    return folder / top


def results(python: Path, tests: Path, run: str, report: Path, models: dict[str, str]) -> Results:
    """The tests in a process of their own, with the Llama that `run` names."""
    told = {"PEER_RUN": run, "PEER_REPORT": str(report), "PEER_MODELS": json.dumps(models)}
    found = os.environ | told | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    command = [str(python), "-m", "pytest", "-q", "-p", "peer_plugin", "-p", "no:cacheprovider", "-rfE", "tests"]
    log = subprocess.run(command, cwd=tests, env=found, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"--- {run}\n{log.stdout[-3000:]}", file=sys.stderr)
    if log.returncode not in (0, 1):
        sys.exit(f"{run}: expected tests that run, got pytest's code {log.returncode}")
    told_back = json.loads(report.read_text())
    made, acted = told_back["made"], told_back["acted"]
    print(f"{run}: {made} times a SteeredLlama, {acted} of them steered", file=sys.stderr)
    if (made == 0) != (run == "plain") or (acted > 0) != (run == "30"):
        sys.exit(f"{run}: expected another Llama, got {made} SteeredLlamas, {acted} of them steered")
    found_results: Results = told_back["results"]
    return found_results


def complaints(found: dict[str, Results]) -> list[str]:
    """Differences from the plain Llama that are not explained, and explanations of what is not so."""
    wrong = []
    for test, plain in found["plain"].items():
        different = any(found[run].get(test) != plain for run in RUNS[1:])
        explained = any(word in test for word in EXPLAINED)
        if different and not explained:
            wrong.append(f"{test}: another result than the plain Llama's")
        if explained and not different and plain != "skipped":
            wrong.append(f"{test}: explained, but as the plain Llama's")
    return wrong


@click.command()
@click.option("--model", "given", multiple=True, metavar="FILE=PATH", help="A model for a file that the tests fetch.")
@click.option("--sdist", type=click.Path(exists=True, path_type=Path), help="A source distribution that is there.")
def main(given: tuple[str, ...], sdist: Path | None) -> None:
    """Run llama-cpp-python's own tests on SteeredLlama."""
    python = beside(ROOT / "build" / "peer-suite", ["scipy", "pytest", "huggingface_hub"])
    models = {name: str(resolve(model, fetch=True)) for name, model in MODELS.items()}
    models |= dict(each.split("=", 1) for each in given)
    with tempfile.TemporaryDirectory() as name:
        tests = unpacked(sdist or downloaded(Path(name)), Path(name))
        found = {run: results(python, tests, run, Path(name) / "report.json", models) for run in RUNS}
    print("| test | plain Llama | off | at 0 | at 30° |\n|---|---|---|---|---|")
    for test in sorted(set().union(*found.values())):
        print(f"| `{test}` | {' | '.join(found[run].get(test, 'missing') for run in RUNS)} |")
    for run in RUNS:
        counted = {kind: list(found[run].values()).count(kind) for kind in ("passed", "failed", "skipped")}
        print(f"{run}: {', '.join(f'{count} {kind}' for kind, count in counted.items())}", file=sys.stderr)
    wrong = complaints(found)
    print("\n".join(wrong), file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
