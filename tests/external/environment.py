"""Environments beside the current one: they see its packages, so that llama-cpp-python is not compiled again."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path


def beside(folder: Path, packages: Sequence[str]) -> Path:
    """The interpreter of the environment at `folder`, made where there is none, with `packages` installed.

    Raises CalledProcessError where pip cannot install them.
    """
    python = folder / "bin" / "python"
    ready = folder / "packages.txt"
    wanted = "\n".join(packages)
    if not ready.is_file() or ready.read_text() != wanted:
        venv.create(folder, clear=True, with_pip=True)
        command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        own = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
        # addsitedir also follows the .pth files there, an editable install's among them.
        (own / "shared.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True, stdout=sys.stderr)
        ready.write_text(wanted)
    return python
