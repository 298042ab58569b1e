"""What malformed files cost: every flipped bit and every length of the small files, and large files that only claim.

    python tests/fuzz/hostile_cost.py

Prints for each how many were tried, refused and sound, the processor seconds of the slowest, and how much the process
grew. Exits 1 where one took over a second, or the process grew by more than 64 MB beyond what the file itself holds.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raw_gguf import ARRAY, BOOL, F32, STRING, U8, U32, array, entry, head, tensor, text
from test_hostile_files import SMALL, flips, refused

GROWTH = 64 << 20


def claims() -> Iterator[tuple[str, bytes]]:
    """Files of megabytes at most that say they hold more, or make the most of what they hold."""
    for count in (2**31, 2**40, 2**63, 2**64 - 1):
        for item in (U8, F32, BOOL, STRING, ARRAY):
            yield f"{count} of {item}", head(entry("steering.0.basis", ARRAY, array(item, count, bytes(4096))))
        yield f"{count} keys", head(keys=count)
        yield f"{count} tensors", head(infos=count)
        yield f"a shape of {count}", head(tensors=(tensor("t", (count, 1)),), data=bytes(32))
    yield "a million empty strings", head(entry("steering.0.sites", ARRAY, array(STRING, 10**6, bytes(8 * 10**6))))
    yield "65 thousand keys", head(*(entry(f"steering.{n}.name", U8, b"\0") for n in range(1 << 16)))
    yield "a name of megabytes", head(entry("steering.0.name", STRING, text("\1" * (4 << 20))))
    version, most = struct.pack("<I", 1), struct.pack("<I", 2**32 - 1)
    yield "four billion steerings", head(entry("steering.version", U32, version), entry("steering.count", U32, most))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.gguf"

        def tried(name: str, files: Iterator[object], readers: str) -> None:
            nonlocal fine
            start, slowest, counts = resident(), 0.0, [0, 0]
            for _ in files:
                for read in SMALL[readers][1]:
                    began = time.process_time()
                    counts[refused(path, read)] += 1
                    slowest = max(slowest, time.process_time() - began)
            grown = resident() - start
            fine &= slowest < 1 and grown < GROWTH
            print(
                f"{name}: {sum(counts)} tried, {counts[1]} refused, {counts[0]} sound, slowest {slowest * 1e3:.1f} ms, "
                f"grown by {grown / 1e6:.1f} MB",
                flush=True,
            )

        def lengths() -> Iterator[int]:
            whole = path.read_bytes()
            for length in range(len(whole)):
                path.write_bytes(whole[:length])
                yield length

        def written() -> Iterator[str]:
            for name, raw in claims():
                path.write_bytes(raw)
                yield name

        for kind, (make, _) in SMALL.items():
            make(path)
            tried(f"{kind}, every flipped bit", flips(path), kind)
            tried(f"{kind}, every length", lengths(), kind)
        tried("what large files claim", written(), "model")
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
