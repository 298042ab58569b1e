"""Coverage-guided fuzzing of what reads files: python tests/fuzz/fuzz_files.py gguf|prompts CORPUS [libFuzzer options]

gguf:    one file as a steering, as a model and as a control vector.
prompts: one file as .txt, .jsonl and .csv.

Whatever is raised but a SteerError of one short line ends the run, and the input stays behind. Run by
`just fuzz-files SECONDS`; takes `pip install atheris`.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from test_hostile_files import SMALL, refused

from edge_steer.prompt_files import read_prompts

PROMPTS = {
    "txt": b"one\n\ntwo\n",
    "jsonl": '{"prompt": "a", "system": "é", "prefix": null}\n{"prompt": "\\u00e9"}\n'.encode(),
    "csv": b'prompt,system\n"a, ""b""\nc",d\ne,\n',
}


def gguf(path: Path) -> None:
    for _, reads in SMALL.values():
        for read in reads:
            refused(path, read)


def prompts(path: Path) -> None:
    for suffix in PROMPTS:
        refused(path.rename(path.with_suffix(f".{suffix}")), read_prompts)
        path.with_suffix(f".{suffix}").rename(path)


def plant(target: str, corpus: Path) -> None:
    """The files to begin with."""
    corpus.mkdir(parents=True, exist_ok=True)
    if target == "gguf":
        for name, (make, _) in SMALL.items():
            make(corpus / name)
    else:
        for name, seed in PROMPTS.items():
            (corpus / name).write_bytes(seed)


def instrument() -> None:
    """Let atheris see which lines run: every function of ours that is loaded, however it was imported."""
    for each in gc.get_objects():
        if isinstance(each, types.FunctionType) and str(each.__module__).startswith("edge_steer"):
            atheris.instrument_func(each)


def main() -> None:
    targets: dict[str, Callable[[Path], None]] = {"gguf": gguf, "prompts": prompts}
    target, corpus, *options = sys.argv[1:]
    plant(target, Path(corpus))
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        path = Path(folder) / "input"

        def one(data: bytes) -> None:
            path.write_bytes(data)
            targets[target](path)

        # A message of numpy's on stderr would be a second line: it counts as a failure too.
        np.seterr(all="raise", under="ignore")
        instrument()
        atheris.Setup([sys.argv[0], corpus, *options], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
