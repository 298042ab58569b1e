"""From prompts to a Steering, with a recorder whose model is known: planted directions come back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pytest

from edge_steer._version import __version__
from edge_steer.calibration import calibrate as calibrate_some
from edge_steer.calibration.classes import filter_sites, passes
from edge_steer.calibration.sums import ClassSums, Step
from edge_steer.errors import SteerError
from edge_steer.prompts import Prompt, PromptSet
from edge_steer.provenance import BaseModel
from edge_steer.rotation import TurnBy
from edge_steer.sites import Site
from edge_steer.steering import Steering

D, BLOCKS = 24, 4
SITES = tuple(Site(layer, kind) for layer in range(BLOCKS) for kind in ("attn_norm", "ffn_norm"))

STREAM = tuple(Site(layer, "layer_out") for layer in range(BLOCKS))


class PlantedModel:
    """A recorder of a made-up model: h = mean + (±1 + shift)·strength·direction + noise, every site its own.

    strength, shift: (S,). A site's class means along its direction are strength·(shift ± 1).
    """

    name = "native"
    base = BaseModel("llama", "planted", BLOCKS, D, "abc")
    sink: np.ndarray | None = None  # (S, d)

    def __init__(self, sites: Sequence[Site] = SITES, *, noise: float = 0.3) -> None:
        rng = np.random.default_rng(0)
        count = len(sites)
        self.sites = tuple(sites)
        axes = np.stack([np.linalg.qr(rng.normal(size=(D, 2)))[0].T for _ in range(count)])
        self.direction, self.mean = axes[:, 0], 10 * axes[:, 1]
        self.strength, self.shift, self.noise = np.ones(count), np.zeros(count), noise

    def rows(self, prompts: Sequence[Prompt], step: Step) -> Iterator[np.ndarray]:
        for prompt in prompts:
            sign, number = prompt.prompt[0], int(prompt.prompt[1:])
            noise = np.random.default_rng(number + 1000 * (sign == "+")).normal(size=(len(self.sites), D))
            # Noise that cancels over an even class, so that the class means are exactly as planted.
            partner = np.random.default_rng((number ^ 1) + 1000 * (sign == "+")).normal(size=(len(self.sites), D))
            level = self.strength * (self.shift + (1 if sign == "+" else -1))
            h = self.mean + level[:, None] * self.direction + self.noise * (noise - partner)
            step(1)
            yield h.astype(np.float32)

    def sums(self, prompts: Sequence[Prompt], step: Step) -> ClassSums:
        found = ClassSums.of(np.stack(list(self.rows(prompts, step))))
        return found if self.sink is None else dataclasses.replace(found, sink=self.sink.astype(np.float64))


def silent(_: int) -> None:
    """No progress."""


def calibrate(model: PlantedModel, prompts: PromptSet, **how: Any) -> Steering:
    """As calibrate, at every site of the model."""
    return calibrate_some(model, prompts, **{"kinds": ("attn_norm", "ffn_norm"), **how})


def prompt_set(count: int = 10, negative: int | None = None) -> PromptSet:
    return PromptSet(
        "mood", "how it feels", "happy", "sad",
        tuple(Prompt(f"+{number}") for number in range(count)),
        tuple(Prompt(f"-{number}") for number in range(count if negative is None else negative)),
        (),
    )  # fmt: skip


def test_local_planes_are_at_the_sites_that_attention_reads_unless_told_otherwise() -> None:
    model, prompts = PlantedModel(), prompt_set()
    attention = tuple(site for site in SITES if site.kind == "attn_norm")
    assert calibrate(model, prompts, kinds=None).sites == attention
    assert calibrate(model, prompts, kinds=None, operator="addition").sites == attention
    assert calibrate(shared_direction(), prompts, kinds=None, plane="global").sites == SITES
    assert calibrate(model, prompts, kinds=("ffn_norm",)).sites == tuple(sorted(set(SITES) - set(attention)))
    # Falcon-40B's attention reads a norm of its own; a steering of the residual stream has no attention norms.
    falcon = PlantedModel([Site(layer, kind) for layer in (0, 1) for kind in ("attn_norm", "attn_norm_2")])
    assert filter_sites(falcon, "local", None, None)[1].tolist() == [1, 3]


def test_the_residual_stream_is_turned_in_the_upper_half_or_the_layers_given() -> None:
    model, prompts = PlantedModel(STREAM), prompt_set()
    assert [site.layer for site in calibrate(model, prompts, kinds=None).sites] == [2, 3]
    assert [site.layer for site in calibrate(model, prompts, kinds=None, layers=(1, 2)).sites] == [1, 2]
    with pytest.raises(SteerError, match="expected layers within 0-3, got 4-9"):
        calibrate(model, prompts, kinds=None, layers=(4, 9))


def test_a_plane_of_the_residual_stream_holds_its_mean_and_does_not_lean() -> None:
    model = PlantedModel(STREAM, noise=0.0)
    model.strength[:] = np.linspace(0.2, 1, BLOCKS)
    steering = calibrate(model, prompt_set(), kinds=None)
    for site in steering.sites:
        assert steering.basis_at(site)[1] @ model.mean[site.layer] == pytest.approx(-10)


def test_a_shared_plane_is_that_of_the_site_at_seven_tenths_of_the_depth() -> None:
    model, prompts = PlantedModel(STREAM), prompt_set()
    steering = calibrate(model, prompts, kinds=None, plane="shared", layers=(1, 3))
    assert (steering.basis.shape, len(steering.steered)) == ((1, 2, D), 3)
    assert steering.basis[0, 0] @ model.direction[3] > 0.99
    elsewhere = calibrate(model, prompts, kinds=None, plane="shared", layers=(1, 1))
    np.testing.assert_array_equal(elsewhere.basis, steering.basis)
    assert calibrate(model, prompts, kinds=None, plane="shared", operator="addition").basis.shape == (1, 1, D)
    with pytest.raises(SteerError, match="expected one kind of site for a shared plane, got attn_norm, ffn_norm"):
        calibrate(PlantedModel(), prompts, plane="shared")


def test_planes_of_the_stream_before_layer_norms_are_orthogonal_to_ones() -> None:
    model = PlantedModel(STREAM)
    model.base = dataclasses.replace(model.base, architecture="gptneox")
    steering = calibrate(model, prompt_set(), kinds=None)
    assert np.abs(steering.basis.sum(-1)).max() < 1e-5
    assert np.abs(calibrate(PlantedModel(STREAM), prompt_set(), kinds=None).basis.sum(-1)).max() > 0.1


def test_directions_are_orthogonal_to_what_is_projected_out() -> None:
    model, prompts = PlantedModel(STREAM), prompt_set()
    tilted = PlantedModel(STREAM)
    tilted.direction = (model.direction + np.roll(model.direction, 1, axis=-1)) / np.sqrt(2)
    axis = calibrate(tilted, prompts, kinds=None, layers=(0, 3), name="other")
    plain = calibrate(model, prompts, kinds=None)
    steering = calibrate(model, prompts, kinds=None, orthogonal_to=[axis])
    assert steering.made.orthogonal_to == ("other",)
    for site in steering.sites:
        r, u = axis.basis_at(site)[0], plain.basis_at(site)[0]
        assert abs(u @ r) > 0.5
        left = u - (u @ r) * r
        np.testing.assert_allclose(steering.basis_at(site)[0], left / np.linalg.norm(left), atol=1e-6)


def test_what_cannot_be_projected_out_is_one_clear_line() -> None:
    model, prompts = PlantedModel(STREAM), prompt_set()
    axis = calibrate(model, prompts, kinds=None, layers=(0, 3))
    with pytest.raises(SteerError, match="expected directions of their own, got ones along"):
        calibrate(model, prompts, kinds=None, orthogonal_to=[axis])
    with pytest.raises(SteerError, match=r"expected steering 'mood' at blk.0.attn_norm to be orthogonal to it there"):
        calibrate(PlantedModel(), prompts, orthogonal_to=[axis])


def test_a_site_turns_its_mean_by_the_root_of_its_share_of_the_largest_class_angle() -> None:
    model = PlantedModel(noise=0.0)
    model.strength[:] = np.linspace(0.2, 1, len(SITES))
    steering = calibrate(model, prompt_set())
    assert steering.mask.all()
    # Between the means 10·b2 ± strength·b1 lies an angle of 2·atan(strength / 10).
    share = np.sqrt(np.arctan(model.strength / 10) / np.arctan(0.1))
    for number, site in enumerate(SITES):
        basis = steering.basis_at(site).astype(np.float64)
        moved = (TurnBy(5.0)(model.mean[number], basis) - model.mean[number]) @ model.direction[number]
        assert moved == pytest.approx(10 * share[number] * np.sin(np.deg2rad(5)), rel=1e-5)


def test_planted_directions_come_back_with_their_signs() -> None:
    model = PlantedModel(noise=0.0)
    steering = calibrate(model, prompt_set())
    assert (steering.operator, steering.plane, steering.name) == ("selective", "local", "mood")
    assert steering.sites == SITES
    assert steering.mask.all()
    for number, site in enumerate(SITES):
        b1, b2 = steering.basis_at(site)
        assert b1 @ model.direction[number] > 0.99999
        assert b2 @ model.mean[number] == pytest.approx(-10)
        turned = TurnBy(5.0)(model.mean[number], steering.basis_at(site).astype(np.float64))
        assert turned @ model.direction[number] == pytest.approx(10 * np.sin(np.deg2rad(5)), rel=1e-3)


def test_a_site_where_the_classes_do_not_differ_is_left_out_with_a_note() -> None:
    model = PlantedModel()
    model.strength[0] = 0
    notes: list[str] = []
    steering = calibrate(model, prompt_set(), note=notes.append)
    assert steering.sites == SITES[1:]
    assert len(steering.basis) == len(SITES) - 1
    assert steering.basis_at(SITES[3])[0] @ model.direction[3] > 0.99999
    assert notes == ["blk.0.attn_norm is left out: both classes have the same mean activation there"]


def test_a_site_whose_mean_is_parallel_to_its_direction_is_left_out_of_planes_but_not_of_addition() -> None:
    model = PlantedModel(noise=0.0)
    model.mean[2] = 5 * np.eye(D)[3]
    model.direction[2] = np.eye(D)[3]
    notes: list[str] = []
    assert SITES[2] not in calibrate(model, prompt_set(), note=notes.append).sites
    assert notes == ["blk.1.attn_norm is left out: its mean activation is parallel to its direction"]
    assert SITES[2] in calibrate(model, prompt_set(), operator="addition").sites


def test_the_mask_follows_the_plane_and_the_operator() -> None:
    model = PlantedModel()
    model.shift[[1, 4, 5]] = 3.0  # both class means on one side: not discriminative
    prompts = prompt_set()
    by_site = calibrate(model, prompts, mask="site")
    assert by_site.mask.tolist() == [True, False, True, True, False, False, True, True]
    by_layer = calibrate(model, prompts, mask="layer")
    assert by_layer.mask.tolist() == [False, False, True, True, False, False, True, True]
    assert calibrate(model, prompts).mask.all()
    assert calibrate(model, prompts, mask="all").mask.all()


def test_the_global_plane_is_masked_by_layer_but_not_for_operators_that_turn_to_an_angle() -> None:
    model, prompts = shared_direction(), prompt_set()
    for operator, masked in (("selective", True), ("ablation", True), ("standard", False), ("adaptive", False)):
        default = calibrate(model, prompts, plane="global", operator=operator).mask
        expected = calibrate(model, prompts, plane="global", operator=operator, mask="layer" if masked else "all").mask
        assert default.tolist() == expected.tolist()


def shared_direction() -> PlantedModel:
    """Directions near one of them, which is thus the best; the mean is the same at all sites."""
    model = PlantedModel()
    common, other, mean = np.linalg.qr(np.random.default_rng(1).normal(size=(D, 3)))[0].T
    tilt = np.deg2rad(np.arange(len(SITES)) * 10 - 30)
    model.direction = np.cos(tilt)[:, None] * common + np.sin(tilt)[:, None] * other
    model.mean = np.repeat(10 * mean[None] - 3 * other, len(SITES), axis=0)
    return model


def test_the_global_plane_is_the_best_direction_and_the_spread_of_all() -> None:
    model = shared_direction()
    steering = calibrate(model, prompt_set(), plane="global", mask="all")
    assert steering.basis.shape == (1, 2, D)
    assert not steering.site_plane.any()
    b1, b2 = steering.basis[0].astype(np.float64)
    best = max(range(len(SITES)), key=lambda number: float((model.direction @ model.direction[number]).sum()))
    assert b1 @ model.direction[best] > 0.9999
    span = np.linalg.qr(model.direction[[0, -1]].T)[0]
    assert np.linalg.norm(span.T @ b2) > 0.999
    assert b2 @ model.mean[0] < 0, "a small +θ raises b1·h"


def test_the_global_mask_is_by_layer() -> None:
    model = shared_direction()
    model.mean = np.repeat(10 * np.linalg.svd(model.direction)[2][-1:], len(SITES), axis=0)
    model.shift[5] = 4.0
    steering = calibrate(model, prompt_set(), plane="global")
    assert steering.mask.tolist() == [True] * 4 + [False] * 2 + [True] * 2


@pytest.mark.parametrize("plane", ["local", "global"])
def test_operators_without_an_angle_keep_one_vector(plane: Any) -> None:
    for operator in ("ablation", "addition"):
        steering = calibrate(shared_direction(), prompt_set(), plane=plane, operator=operator, mask="all")
        full = calibrate(shared_direction(), prompt_set(), plane=plane, mask="all")
        assert steering.basis.shape == (1 if plane == "global" else len(SITES), 1, D)
        np.testing.assert_array_equal(steering.basis[:, 0], full.basis[:, 0])


def test_planes_are_orthonormal_in_float32() -> None:
    for plane in ("local", "global"):
        basis = calibrate(shared_direction(), prompt_set(), plane=plane, mask="all").basis.astype(np.float64)
        assert np.abs(np.einsum("lrd,lqd->lrq", basis, basis) - np.eye(2)).max() < 1e-6


def test_separation_is_the_distance_of_the_means_in_pooled_standard_deviations() -> None:
    model, prompts = PlantedModel(), prompt_set(70, 9)
    steering = calibrate(model, prompts, mask="all")
    positive = np.stack(list(model.rows(prompts.positive[:64], silent)))
    negative = np.stack(list(model.rows(prompts.negative, silent)))
    for number, site in enumerate(SITES):
        b1 = steering.basis_at(site)[0].astype(np.float64)
        p, n = positive[:, number] @ b1, negative[:, number] @ b1
        pooled = np.sqrt((63 * p.var(ddof=1) + 8 * n.var(ddof=1)) / 71)
        assert steering.separation[number] == pytest.approx(abs(p.mean() - n.mean()) / pooled, rel=1e-5)


def test_separation_is_nan_where_it_cannot_be_measured() -> None:
    assert np.isnan(calibrate(PlantedModel(), prompt_set(4, 1), mask="all").separation).all()
    assert np.isnan(calibrate(PlantedModel(noise=0.0), prompt_set()).separation).all()


@pytest.mark.parametrize("plane", ["local", "shared", "global"])
def test_the_class_means_are_those_of_h_along_b1_as_it_is_stored(plane: Any) -> None:
    model, prompts = shared_direction(), prompt_set(70, 9)
    kinds = ("attn_norm",) if plane == "shared" else None
    steering = calibrate(model, prompts, plane=plane, mask="all", kinds=kinds)
    assert steering.class_means.shape == (len(steering.sites), 2)
    for side, given in enumerate((prompts.negative, prompts.positive)):
        h = np.stack(list(model.rows(given, silent)))
        for number, site in enumerate(steering.sites):
            along = h[:, SITES.index(site)] @ steering.basis_at(site)[0].astype(np.float64)
            assert steering.class_means[number, side] == pytest.approx(along.mean(), rel=1e-5)


def test_mean_norm_is_the_mean_over_both_classes() -> None:
    model = PlantedModel(noise=0.0)
    model.shift[:] = 1.0
    steering = calibrate(model, prompt_set(6, 2), mask="all")
    np.testing.assert_allclose(steering.mean_norm, (6 * np.sqrt(104) + 2 * 10) / 8, rtol=1e-6)


def test_the_steering_says_how_it_was_made() -> None:
    prompts = prompt_set(6, 4)
    steering = calibrate(PlantedModel(), prompts, name="mine")
    assert (steering.name, steering.description) == ("mine", "how it feels")
    assert (steering.positive, steering.negative) == ("happy", "sad")
    assert steering.base == PlantedModel.base
    made = steering.made
    assert (made.recorder, made.model, made.version) == ("native", "planted", __version__)
    assert made.prompts_sha256 == prompts.sha256
    assert (made.positive_count, made.negative_count) == (6, 4)
    assert datetime.fromisoformat(made.date).tzinfo is not None
    assert np.isnan([steering.angle, steering.angle_min, steering.angle_max, steering.threshold]).all()
    assert calibrate(PlantedModel(), prompts, operator="adaptive").threshold == 0.0


def test_progress_counts_every_prompt_that_runs() -> None:
    prompts, steps = prompt_set(70, 5), list[int]()
    calibrate(PlantedModel(), prompts, mask="all", step=steps.append)
    assert sum(steps) == passes(prompts) == 70 + 5
    assert passes(prompts, [prompt_set(40)]) == 70 + 5 + 32 + 32


def test_what_cannot_be_calibrated_is_one_clear_line() -> None:
    def line(model: PlantedModel, prompts: PromptSet, **options: Any) -> str:
        with pytest.raises(SteerError) as caught:
            calibrate(model, prompts, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    model, prompts = PlantedModel(), prompt_set()
    assert line(model, prompts, kinds=("layer_out",)).startswith("expected a recorded site of kind layer_out, got none")
    equal = PlantedModel()
    equal.strength[:] = 0
    one_sided = PlantedModel()
    one_sided.shift[:] = 3
    assert "differ somewhere" in line(equal, prompts)
    assert line(one_sided, prompts, mask="site").endswith("use --mask all")
    assert line(one_sided, prompts, mask="layer").endswith("use --mask all")
    assert line(model, prompts, operator="rotate").startswith("expected operator among selective")
    assert line(model, prompts, plane="round").startswith("expected plane among local, shared, global")
    assert line(model, prompts, mask="none").startswith("expected mask among site, layer, all")


def test_a_class_without_prompts_is_an_error() -> None:
    prompts = prompt_set()
    try:
        empty = dataclasses.replace(prompts, negative=())
    except SteerError:
        return  # a PromptSet that refuses it is as good
    with pytest.raises(SteerError, match="at least one negative prompt"):
        calibrate(PlantedModel(), empty)


def test_rotation_of_the_stream_leaves_the_attention_sink_as_it_is() -> None:
    """The first token's direction is in no plane, and gains nothing for the class from it."""
    model = PlantedModel(STREAM)
    sink = np.random.default_rng(1).normal(size=(BLOCKS, D)) + model.mean
    model.sink = 100 * sink
    made = calibrate(model, prompt_set(), kinds=None)
    for site in made.sites:
        assert np.abs(made.basis_at(site) @ sink[site.layer]).max() < 1e-5
    for kinds, how in ((STREAM, {"operator": "addition"}), (SITES, {})):
        with_sink, without_sink = PlantedModel(kinds), PlantedModel(kinds)
        with_sink.sink = np.ones((len(kinds), D))
        found = [calibrate(each, prompt_set(), kinds=None, **how).basis for each in (with_sink, without_sink)]
        np.testing.assert_array_equal(*found)
