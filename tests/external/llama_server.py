"""The adapter pair on an unmodified llama-server against the hook: next-token probabilities at several angles, chosen
by each request's `lora` field.

    python tests/external/llama_server.py --server PATH/TO/llama-server
    python tests/external/llama_server.py --build            # compiles one from llama-cpp-python's own source first

Not part of the test run: compiling llama-server takes many minutes. Exits 1 where a probability differs by more than
the tolerance.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import llama_cpp
import numpy as np

from edge_steer import SteeredLlama
from edge_steer.calibration import calibrate
from edge_steer.calibration.native_recorder import NativeRecorder
from edge_steer.export.lora import export_pair
from edge_steer.fetch import resolve
from edge_steer.measure.metrics import log_softmax
from edge_steer.preset import load_preset
from edge_steer.rotation import cos_sin

PROMPT = "The weather today was"
TOP = 5
EXACT = ("-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-warmup")


def source_of_llama_cpp(folder: Path) -> Path:
    """llama.cpp's source, of the source distribution of the llama-cpp-python that is installed; kept in `folder`."""
    if not any(folder.glob("*/vendor/llama.cpp")):
        wanted = f"llama-cpp-python=={llama_cpp.__version__}"
        options = ["--no-deps", "--no-binary", ":all:", "-d", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, wanted], check=True)
        (sdist,) = folder.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
    (source,) = folder.glob("*/vendor/llama.cpp")
    return source


def build(folder: Path) -> Path:
    """llama-server, compiled from the source inside llama-cpp-python's source distribution."""
    source = source_of_llama_cpp(folder)
    output = folder / "build"
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DLLAMA_CURL=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
    ]
    subprocess.run(["cmake", "-S", str(source), "-B", str(output), *options], check=True)
    subprocess.run(["cmake", "--build", str(output), "--target", "llama-server", "-j"], check=True)
    return output / "bin" / "llama-server"


def write_f32(path: Path) -> Path:
    """SmolLM2-135M with weights of F32: `path`."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    source = str(resolve("smollm2-135m", fetch=True)).encode()
    if llama_cpp.llama_model_quantize(source, str(path).encode(), parameters):
        raise click.ClickException("llama.cpp could not write the model as F32")
    return path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def running(server: Path, model: Path, adapters: Sequence[Path], *options: str) -> Iterator[str]:
    """An unmodified server on the loopback address with adapters loaded at scale 0; yields its address."""
    port = free_port()
    scaled = ",".join(f"{path}:0" for path in adapters)
    arguments = ["-m", str(model), "--lora-scaled", scaled, "--host", "127.0.0.1", "--port", str(port), "-c", "512"]
    command = [str(server), *arguments, *EXACT, *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            time.sleep(0.5)
            if process.poll() is not None:
                raise click.ClickException(f"the server ended with code {process.returncode}")
            try:
                ask(f"{address}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                continue
        yield address
    finally:
        process.terminate()
        process.wait()


def ask(address: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


@click.command()
@click.option("--server", type=click.Path(path_type=Path), help="An unmodified llama-server.")
@click.option("--build", "compile_it", is_flag=True, help="Compile one.")
@click.option("--angles", default="0,8,45,-90", show_default=True)
@click.option("--tolerance", default=0.02, show_default=True, help="In log-probability, on F32 weights.")
def main(server: Path | None, compile_it: bool, angles: str, tolerance: float) -> None:
    """Compare SmolLM2-135M as F32 with the sentiment preset."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if server is None:
            if not compile_it:
                raise click.UsageError("expected --server PATH or --build")
            server = build(folder)
        model = write_f32(folder / "f32.gguf")
        steering = calibrate(NativeRecorder(model, n_ctx=512), load_preset("sentiment"), name="happy")
        cos, sin, _ = export_pair(model, folder / "happy", steering)
        f32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        llm = SteeredLlama(model, steering=steering, angle=None, n_ctx=512, n_threads=2, **f32)
        tokens = list(llm.tokenize(PROMPT.encode(), add_bos=True))
        worst = 0.0
        with running(server, model, (cos, sin), "-t", "2", "-np", "1") as address:
            for angle in map(float, angles.split(",")):
                llm.angle = angle
                expected = log_softmax(llm.logits([*tokens, 0], len(tokens)))[0]
                c, s = cos_sin(angle)
                reply = ask(
                    f"{address}/completion",
                    {
                        "prompt": tokens, "n_predict": 1, "temperature": 0.0, "n_probs": TOP, "cache_prompt": False,
                        "lora": [{"id": 0, "scale": c - 1}, {"id": 1, "scale": s}],
                    },
                )  # fmt: skip
                found = reply["completion_probabilities"][0]["top_logprobs"]
                differences = [abs(each["logprob"] - float(expected[each["id"]])) for each in found]
                same = {each["id"] for each in found} == set(np.argsort(expected)[-TOP:].tolist())
                worst = max(worst, *differences)
                print(
                    f"{angle:+6g}°  largest difference of the top {TOP} log-probabilities {max(differences):.1e}, "
                    f"{'same' if same else 'other'} tokens; first: {found[0]['token']!r} {found[0]['logprob']:.3f}"
                )
    print(f"largest difference {worst:.1e}, tolerance {tolerance:g}")
    sys.exit(worst > tolerance)


if __name__ == "__main__":
    main()
