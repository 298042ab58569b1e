"""Peak anonymous memory of exporting a steering at every site of an 8B-shaped model.

    python benchmarks/export_memory.py                 # as a pair of adapters and as baked weights; 5 GB of disk
    python benchmarks/export_memory.py --layers 2      # a look that it works

The model has the tensors of Llama-3.1-8B as Q4_K_M has them, all zeros in a sparse file: what an export holds in
memory depends on shapes and types, not on values. RssAnon is read from /proc every few milliseconds while `edge-steer
export` runs as a process of its own (Linux). Mapped pages of the model's file do not count: the system takes them
back when it needs them. Exits 1 where the limit is passed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from edge_steer.architectures import architecture
from edge_steer.model_file import read_model
from edge_steer.rotation import orthonormal
from edge_steer.steering import Steering

WIDTH, FEED_FORWARD, KV_WIDTH, VOCABULARY = 4096, 14336, 1024, 128256


def shapes(layers: int) -> dict[str, tuple[tuple[int, ...], Type]]:
    """Name → shape and type of every tensor; Q4_K_M has half of attn_v and ffn_down as Q6_K."""
    found: dict[str, tuple[tuple[int, ...], Type]] = {
        "token_embd.weight": ((VOCABULARY, WIDTH), Type.Q4_K),
        "output_norm.weight": ((WIDTH,), Type.F32),
        "output.weight": ((VOCABULARY, WIDTH), Type.Q6_K),
    }
    for layer in range(layers):
        larger = Type.Q6_K if layer % 2 else Type.Q4_K
        found |= {
            f"blk.{layer}.{name}.weight": (shape, kind)
            for name, shape, kind in (
                ("attn_norm", (WIDTH,), Type.F32),
                ("attn_q", (WIDTH, WIDTH), Type.Q4_K),
                ("attn_k", (KV_WIDTH, WIDTH), Type.Q4_K),
                ("attn_v", (KV_WIDTH, WIDTH), larger),
                ("attn_output", (WIDTH, WIDTH), Type.Q4_K),
                ("ffn_norm", (WIDTH,), Type.F32),
                ("ffn_gate", (FEED_FORWARD, WIDTH), Type.Q4_K),
                ("ffn_up", (FEED_FORWARD, WIDTH), Type.Q4_K),
                ("ffn_down", (WIDTH, FEED_FORWARD), larger),
            )
        }
    return found


def write_model(path: Path, layers: int) -> None:
    """A GGUF whose tensors are holes in a sparse file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("8B-shaped")
    writer.add_block_count(layers)
    writer.add_context_length(131072)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {number}" for number in range(VOCABULARY)])
    size = 0
    for name, (shape, kind) in shapes(layers).items():
        stored = gguf.quant_shape_to_byte_shape(shape, kind)
        tensor = np.broadcast_to(np.float32(0) if kind == Type.F32 else np.uint8(0), stored)
        writer.add_tensor_info(name, stored, tensor.dtype, tensor.nbytes, None if kind == Type.F32 else kind)
        size += -(-tensor.nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("rb+") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + size)


def random_steering(model: Path) -> Steering:
    """A plane of its own at every default site."""
    file = read_model(model)
    sites = architecture(file.architecture).sites(file.block_count)
    rng = np.random.default_rng(0)
    planes = np.stack([orthonormal(*rng.standard_normal((2, WIDTH))) for _ in sites])
    return Steering(
        name="random",
        operator="selective",
        plane="local",
        sites=tuple(sites),
        mask=np.ones(len(sites), np.bool_),
        site_plane=np.arange(len(sites), dtype=np.uint32),
        basis=planes.astype(np.float32),
        base=file.base,
    )


def peak_anonymous(command: list[str]) -> int:
    """Run a command; the largest RssAnon of its process, in KiB. Raises CalledProcessError if it fails."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status, largest = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        if found := re.search(r"RssAnon:\s+(\d+) kB", status.read_text()):
            largest = max(largest, int(found[1]))
        time.sleep(0.005)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return largest


@click.command()
@click.option("--layers", default=32, show_default=True)
@click.option("--limit", default=1.5, show_default=True, help="GiB.")
@click.option("--folder", type=click.Path(), help="Where to write, 5 GB.  [default: the temporary folder]")
def main(layers: int, limit: float, folder: str | None) -> None:
    """Print one line per kind of export."""
    worst = 0
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        model, steering = place / "model.gguf", place / "steering.gguf"
        write_model(model, layers)
        random_steering(model).save(steering)
        for to, given in (("lora", str(steering)), ("lora", f"{steering}:8"), ("gguf", f"{steering}:8")):
            out = place / "out"
            out.mkdir()
            start = time.monotonic()
            command = [sys.executable, "-m", "edge_steer", "export", "-m", str(model), "-s", given, "--to", to]
            peak = peak_anonymous([*command, "-o", str(out / "steered.gguf")])
            written = sum(file.stat().st_size for file in out.iterdir())
            what = f"{to} at 8°" if given.endswith(":8") else f"{to}, any angle"
            print(
                f"{what:<16} peak RssAnon {peak / 2**20:.2f} GiB, "
                f"model {model.stat().st_size / 1e9:.2f} GB, written {written / 1e9:.2f} GB, "
                f"{time.monotonic() - start:.0f} s",
                flush=True,
            )
            worst = max(worst, peak)
            for file in out.iterdir():
                file.unlink()
            out.rmdir()
    sys.exit(worst > limit * 2**20)


if __name__ == "__main__":
    main()
