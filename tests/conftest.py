"""What tests share: the two small real models, fetched once into the cache, and a tiny random one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edge_steer import SteerError
from edge_steer.fetch import resolve

if TYPE_CHECKING:
    import tiny
    from starlette.testclient import TestClient


def _fetched(name: str) -> Path:
    try:
        return resolve(name, fetch=True)
    except SteerError as error:
        pytest.skip(f"cannot test on the real model {name}: {error}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return _fetched("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma-3-270M base, Q4_K_M."""
    return _fetched("gemma3-270m")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three tiny layers with random weights, F32."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import tiny

    return tiny.build("llama", tmp_path_factory.mktemp("tiny")).gguf_path


@pytest.fixture(scope="module")
def client(model: Path) -> Iterator[TestClient]:
    """A client of a server of that model with two steerings."""
    from serving import serving

    with serving(model) as made:
        yield made


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tiny.TinyModel]:
    """The tiny model of a family, built when it is first asked for."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import tiny

    folder = tmp_path_factory.mktemp("tiny")
    built: dict[str, tiny.TinyModel] = {}

    def get(family: str) -> tiny.TinyModel:
        built[family] = built.get(family) or tiny.build(family, folder)
        return built[family]

    return get
