"""What this machine, this build and a model can do."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections import Counter
from typing import Any

import llama_cpp
import numpy as np

from edge_steer._version import __version__
from edge_steer.compatibility import TESTED
from edge_steer.model_file import read_model
from edge_steer.runtime.hook import Record
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.runtime.native import check_library


def examine_build() -> dict[str, Any]:
    """Versions, features of the llama.cpp build, optional packages.

    Raises SteerError if the native library does not fit.
    """
    check_library()
    features = llama_cpp.llama_print_system_info().decode(errors="replace").strip()
    return {
        "edge-steer": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "llama-cpp-python": f"{llama_cpp.__version__} ({_standing()})",
        "llama.cpp": features,
        "gpu offload": bool(llama_cpp.llama_supports_gpu_offload()),
        "native hook": "loaded, tensor layout checked",
        "torch": _find_version("torch"),
        "transformers": _find_version("transformers"),
        "matplotlib": _find_version("matplotlib"),
        "executable": sys.executable,
    }


def examine_model(model_path: str, **llama: Any) -> dict[str, Any]:
    """Load a model, evaluate one token, and say which of its sites came by and with what norm."""
    file = read_model(model_path)
    llm = SteeredLlama(model_path, steering=(), **llama)
    record = Record.zeros(len(llm.hook_sites), file.embedding_length)
    llm.observe(llm.tokenize(b"Hello", add_bos=True)[:4], record)
    expected = Counter(site.kind for site in llm.hook_sites)
    met = Counter(site.kind for site, count in zip(llm.hook_sites, record.count, strict=True) if count)
    missing = [str(site) for site, count in zip(llm.hook_sites, record.count, strict=True) if not count]
    return {
        "file": str(model_path),
        "name": file.name,
        "architecture": file.architecture,
        "blocks": file.block_count,
        "width": file.embedding_length,
        "trained context": file.context_length,
        "chat template": "the model's own" if file.chat_template else "none: {prompt}\\nAnswer:",
        "tokenizer sha256": file.tokenizer_sha256,
        "sites met": [f"{kind} {met[kind]} of {expected[kind]}" for kind in expected],
        "sites missing": missing,
        "finite": bool(np.isfinite(record.sum).all()),
    }


def _standing() -> str:
    same = llama_cpp.__version__ == TESTED
    return "tested" if same else f"has what is relied on; tested was {TESTED}"


def _find_version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    from importlib.metadata import version

    return version(package)
