"""The published calibrations of the method, recomputed from their own candidates."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_steer.architectures import ARCHITECTURES
from edge_steer.calibration.planes import best_direction, global_plane
from edge_steer.sites import Site, site_of_module

torch = pytest.importorskip("torch")

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "reference"
LLAMA, QWEN = "Llama-3.2-1B-Instruct", "Qwen2.5-1.5B-Instruct"
pytestmark = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason=f"the published calibrations are not there: expected {PUBLISHED}"
)


def read(model: str, name: str) -> Any:
    return torch.load(PUBLISHED / model / name, weights_only=True, map_location="cpu")


def sites(model: str, names: Any) -> list[Site]:
    known = ARCHITECTURES["llama" if model == LLAMA else "qwen2"]
    found = [site_of_module(known, name) for name in names]
    assert None not in found
    return [site for site in found if site is not None]


@pytest.mark.parametrize(("model", "best"), [(LLAMA, Site(12, "attn_norm")), (QWEN, Site(22, "attn_norm"))])
def test_the_plane_recomputed_from_the_published_candidates_is_the_published_plane(model: str, best: Site) -> None:
    published = read(model, "directions.pt")
    candidates = {name: vector.double().numpy() for name, vector in published["candidates"].items()}
    assert [name for name, vector in candidates.items() if not vector.any()] == ["model.layers.0.input_layernorm"]
    kept = {name: vector / np.linalg.norm(vector) for name, vector in candidates.items() if vector.any()}
    unit = np.stack(list(kept.values()))

    number = best_direction(unit)
    assert sites(model, kept)[number] == best
    assert list(kept)[number] == published["selected_layer"]
    basis = global_plane(unit)
    given = np.stack([vector.double().numpy() for vector in read(model, "plane.pt")["basis"]])
    cosines = np.abs((basis * given).sum(1) / np.linalg.norm(given, axis=1))
    print(f"{model}: |cos(b1)| {cosines[0]:.6f}, |cos(b2)| {cosines[1]:.6f}")
    assert cosines[0] > 0.999999
    assert cosines[1] >= 0.9999


@pytest.mark.parametrize(("model", "layers"), [(LLAMA, [4, *range(8, 16)]), (QWEN, list(range(17, 28)))])
def test_the_published_masks_steer_whole_layers(model: str, layers: list[int]) -> None:
    mask = read(model, "plane.pt")["extra_info"]["layer_steering_mask"]
    by_layer = defaultdict(list)
    for site, on in zip(sites(model, mask), mask.values(), strict=True):
        by_layer[site.layer].append((site.kind, on))
    assert all([kind for kind, _ in found] == ["attn_norm", "ffn_norm"] for found in by_layer.values())
    assert all(len({on for _, on in found}) == 1 for found in by_layer.values())
    assert [layer for layer, found in by_layer.items() if found[0][1]] == layers


def test_modules_have_the_sites_of_their_architecture() -> None:
    def site(architecture: str, module: str) -> Site | None:
        return site_of_module(ARCHITECTURES[architecture], module)

    assert site("llama", "model.layers.12.post_attention_layernorm") == Site(12, "ffn_norm")
    assert site("gemma2", "model.layers.3.post_attention_layernorm") == Site(3, "attn_post_norm")
    assert site("gemma3", "model.layers.3.pre_feedforward_layernorm") == Site(3, "ffn_norm")
    assert site("gemma3", "model.language_model.layers.3.input_layernorm") == Site(3, "attn_norm")
    assert site("gemma3", "language_model.model.layers.3.input_layernorm") == Site(3, "attn_norm")
    assert site("gemma3", "model.vision_tower.vision_model.encoder.layers.0") is None
    assert site("llama", "model.layers.5") == Site(5, "layer_out")
    assert site("gptneox", "gpt_neox.layers.2.input_layernorm") == Site(2, "attn_norm")
    for module in ("model.norm", "model.layers", "model.layers.5.mlp", "model.layers.5.self_attn.q_norm", "lm_head"):
        assert site("llama", module) is None
