"""Turning on a GPU, on a machine that has none: ggml's Vulkan backend on a Vulkan device in software, Mesa's lavapipe.

    python tests/external/vulkan.py                            # compiles the backend first, or takes what it compiled
    python tests/external/vulkan.py --backend PATH/TO/libggml-vulkan.so
    python tests/external/vulkan.py -D Vulkan_INCLUDE_DIR=PATH -D SPIRV-Headers_DIR=PATH       # newer headers elsewhere

Not part of the test run: compiling takes many minutes, and software is slow. Only the backend is compiled, from the
source of the llama-cpp-python that is installed, as a module which that one loads. Arguments behind `--` go to pytest.
Needs cmake, a C++ compiler, glslc, Vulkan's and SPIR-V's headers (1.4 is new enough, 1.3.239 is not), Vulkan's loader
and lavapipe; on Debian: glslc libvulkan-dev spirv-headers mesa-vulkan-drivers. Where one lacks it says that nothing was
tried and exits 77. Where the machine has a GPU with a Vulkan driver, `--device` takes that in place of lavapipe.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import llama_cpp
from llama_server import source_of_llama_cpp

ROOT = Path(__file__).parents[2]
DRIVERS = ("/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/etc/vulkan/icd.d")
# Nothing but the backend: it is loaded by the llama.cpp that is installed.
OPTIONS = (
    "CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=ON", "GGML_BACKEND_DL=ON", "GGML_VULKAN=ON", "GGML_CPU=OFF",
    "GGML_NATIVE=OFF", "LLAMA_CURL=OFF", "LLAMA_BUILD_COMMON=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_TOOLS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_SERVER=OFF",
)  # fmt: skip


def nothing_tried(reason: str) -> None:
    print(f"NOTHING WAS TRIED: {reason}", file=sys.stderr)
    sys.exit(77)


def lavapipe() -> Path | None:
    """The file that names Mesa's software driver to Vulkan's loader."""
    return next((found for folder in DRIVERS for found in Path(folder).glob("lvp_icd*.json")), None)


def build(folder: Path, definitions: tuple[str, ...], jobs: int) -> Path:
    """ggml's Vulkan backend as a module; what was compiled before is kept."""
    output = folder / "build"
    if missing := [tool for tool in ("cmake", "c++", "glslc") if shutil.which(tool) is None]:
        nothing_tried(f"{', '.join(missing)} not found; see {Path(__file__).name}")
    source = source_of_llama_cpp(folder)
    options = [f"-D{each}" for each in (*OPTIONS, *definitions)]
    if subprocess.run(["cmake", "-S", str(source), "-B", str(output), *options], check=False).returncode:
        nothing_tried("cmake does not find what the Vulkan backend needs, see above")
    subprocess.run(["cmake", "--build", str(output), "--target", "ggml-vulkan", "-j", str(jobs)], check=True)
    return next(output.rglob("*ggml-vulkan.so"))


@click.command()
@click.option("--backend", type=click.Path(path_type=Path, exists=True), help="A backend's module that is compiled.")
@click.option("--device", default=None, help="Vulkan's number of a device, in place of lavapipe.")
@click.option("-D", "definitions", multiple=True, help="For cmake: NAME=VALUE.")
@click.option("--jobs", default=os.cpu_count() or 1, show_default=True)
@click.argument("pytest_arguments", nargs=-1)
def main(
    backend: Path | None, device: str | None, definitions: tuple[str, ...], jobs: int, pytest_arguments: tuple[str, ...]
) -> None:
    """Run tests/test_gpu.py, the real model among it."""
    driver = lavapipe()
    if device is None and driver is None:
        nothing_tried("Mesa's lavapipe is not installed; on Debian: mesa-vulkan-drivers")
    folder = ROOT / "build" / f"vulkan-{llama_cpp.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    backend = backend or build(folder, definitions, jobs)
    # ggml passes devices in software by unless one is named.
    environment = {"GGML_BACKEND_PATH": str(backend.resolve()), "GGML_VK_VISIBLE_DEVICES": device or "0"}
    if device is None:
        environment |= {"VK_DRIVER_FILES": str(driver), "VK_ICD_FILENAMES": str(driver)}  # today's name and the older
    tests = [str(ROOT / "tests" / "test_gpu.py"), "-m", "slow or not slow", "-rs", *pytest_arguments]
    command = [sys.executable, "-m", "pytest", *tests]
    sys.exit(subprocess.run(command, env=os.environ | environment, check=False, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
