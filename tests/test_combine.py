"""Steerings made of steerings: the mathematics of sums and projections, the expression, the verb."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import ran, run, steering_for
from numpy.typing import NDArray
from planted import random_steering
from tiny import build

from edge_steer import MismatchError, NoEffectError, SteeredLlama, SteerError, Steering, combine, find_steerings
from edge_steer.provenance import BaseModel
from edge_steer.rotation import TurnBy, orthonormal
from edge_steer.runtime.dials import named_steerings
from edge_steer.sites import Site
from edge_steer.steering import save_all

BASE = BaseModel("llama", "Tiny", 6, 32, "ab" * 32)
NORMS = tuple(Site(layer, "attn_norm") for layer in range(6))
STREAM = tuple(Site(layer, "layer_out") for layer in range(1, 6))
TOKENS = list(range(40, 60))


def steering(
    name: str, sites: Sequence[Site] = NORMS, *, angle: float = 8.0, seed: int | None = None, **kwargs: Any
) -> Steering:
    made = random_steering(BASE, sites, seed=sum(name.encode()) if seed is None else seed, name=name, **kwargs)
    return made.with_(angle=angle)


def leaning(name: str, mean: NDArray[np.float64], sites: Sequence[Site] = NORMS, angle: float = 8.0) -> Steering:
    """A steering whose planes all have the same second axis, −unit(mean), as where a mean is orthogonal to b1."""
    rng = np.random.default_rng(sum(name.encode()))
    b2 = -mean / np.linalg.norm(mean)
    rows = [rng.standard_normal(32) for _ in sites]
    basis = np.stack([np.stack([orthonormal(b2, row)[1], b2]) for row in rows])
    return steering(name, sites, angle=angle).with_(basis=basis.astype(np.float32))


def b1(of: Steering, site: Site) -> NDArray[np.float64]:
    return of.basis_at(site)[0].astype(np.float64)


MEAN = np.random.default_rng(5).standard_normal(32)
A, B, C = (leaning(name, MEAN, angle=angle) for name, angle in (("a", 8.0), ("b", 6.0), ("c", 5.0)))


@pytest.mark.parametrize("sites", [NORMS, STREAM], ids=["norms", "stream"])
def test_one_times_a_is_a(sites: tuple[Site, ...]) -> None:
    a = steering("a", sites)
    same = combine("1*a", [a])
    assert same.sites == a.sites
    assert same.angle == a.angle
    np.testing.assert_allclose(same.basis, a.basis, atol=1e-7)


def test_a_weight_alone_changes_the_dial_and_no_plane() -> None:
    part = combine("0.3*a", [A])
    np.testing.assert_allclose(part.basis, A.basis, atol=1e-7)
    assert part.angle == pytest.approx(0.3 * A.angle)


def test_a_negated_steering_turns_by_the_opposite_angle() -> None:
    back = combine("-a", [A])
    h = np.random.default_rng(1).standard_normal((7, 32))
    for site in A.sites:
        there, here = (each.basis_at(site).astype(np.float64) for each in (back, A))
        np.testing.assert_allclose(TurnBy(17)(h, there), TurnBy(-17)(h, here), atol=1e-6)
    assert back.angle == A.angle


def test_a_sum_is_the_weighted_sum_of_angles_and_directions() -> None:
    both = combine("0.5*a - 2*b", [A, B])
    lengths = []
    for site in both.sites:
        v = 0.5 * 8 * b1(A, site) - 2 * 6 * b1(B, site)
        lengths.append(np.linalg.norm(v))
        np.testing.assert_allclose(b1(both, site), v / lengths[-1], atol=1e-7)
    assert both.angle == pytest.approx(np.mean(lengths))


def test_many_signs_are_read() -> None:
    assert combine("-" * 390 + "a", [A]).angle == pytest.approx(A.angle)


def test_a_dial_given_is_what_a_weight_of_one_stands_for() -> None:
    assert combine("a", [A], angles={"a": 3}).angle == pytest.approx(3)
    one, other = combine("a + b", [A, B], angles={"a": 1, "b": 9}), combine("a/8 + 1.5*b", [A, B])
    np.testing.assert_allclose(one.basis, other.basis, atol=1e-6)
    assert one.angle == pytest.approx(other.angle)


def test_where_planes_share_their_second_axis_the_sum_keeps_it_and_one_plane_holds_it_all() -> None:
    notes: list[str] = []
    both = combine("a - 0.5*b + 0.25*c", [A, B, C], note=notes.append)
    for site in both.sites:
        np.testing.assert_allclose(both.basis_at(site)[1], A.basis_at(site)[1], atol=1e-6)
    assert notes == []


def test_to_first_order_the_sum_does_what_its_parts_do_in_turn() -> None:
    both = combine("a - 0.5*b", [A, B])
    h = np.random.default_rng(2).standard_normal((50, 32))
    for site in both.sites:
        v = np.linalg.norm(8 * b1(A, site) - 3 * b1(B, site))
        small = 1e-3
        parts = TurnBy(-3 * small)(TurnBy(8 * small)(h, A.basis_at(site)), B.basis_at(site))
        one = TurnBy(v * small)(h, both.basis_at(site))
        moved = np.abs(one - h).max()
        assert np.abs(parts - one).max() < 2e-3 * moved


@pytest.mark.parametrize("sites", [NORMS, STREAM], ids=["norms", "stream"])
def test_a_without_b_is_orthogonal_to_b_at_every_site(sites: tuple[Site, ...]) -> None:
    a, b = steering("a", sites), steering("b", sites)
    left = combine("a ~ b", [a, b])
    assert left.sites == sites
    for site in sites:
        assert abs(b1(left, site) @ b1(b, site)) < 1e-7
        u = b1(a, site) - (b1(a, site) @ b1(b, site)) * b1(b, site)
        np.testing.assert_allclose(b1(left, site), u / np.linalg.norm(u), atol=1e-7)


def test_a_without_b_is_orthogonal_to_a_sum_too() -> None:
    left = combine("a ~ (b - 0.5*c)", [A, B, C])
    taken = combine("b - 0.5*c", [B, C])
    assert all(abs(b1(left, site) @ b1(taken, site)) < 1e-7 for site in left.sites)


def test_the_component_along_b_points_along_b_with_the_sign_of_the_overlap() -> None:
    part = combine("a | b", [A, B])
    for site in part.sites:
        overlap = b1(A, site) @ b1(B, site)
        np.testing.assert_allclose(b1(part, site), np.sign(overlap) * b1(B, site), atol=1e-6)


def test_what_lies_along_b_and_what_does_not_make_a_again() -> None:
    a, b = steering("a"), steering("b")
    again = combine("a | b + a ~ b", [a, b])
    np.testing.assert_allclose(again.basis, a.basis, atol=1e-6)
    assert again.angle == pytest.approx(a.angle, rel=1e-6)


def test_sites_are_those_of_all_and_a_steering_is_nothing_where_it_does_not_act() -> None:
    low, high = leaning("low", MEAN, NORMS[:4]), leaning("high", MEAN, NORMS[2:])
    both = combine("low + high", [low, high])
    assert both.sites == NORMS
    for site in NORMS[:2]:
        np.testing.assert_allclose(both.basis_at(site), low.basis_at(site), atol=1e-7)
    for site in NORMS[4:]:
        np.testing.assert_allclose(both.basis_at(site), high.basis_at(site), atol=1e-7)
    masked = low.with_(mask=[True, False, True, True])
    assert NORMS[1] not in combine("low", [masked]).sites


def test_a_site_where_little_is_left_of_the_sum_is_left_out_and_told_of() -> None:
    notes: list[str] = []
    low, all_ = leaning("low", MEAN, NORMS[:2]), leaning("all", MEAN)
    made = combine("low + 0.2*every", {"low": low, "every": all_}, note=notes.append)
    assert made.sites == NORMS[:2]
    assert len(notes) == 1
    assert notes[0].startswith("4 of 6 sites are left out")


def test_planes_too_unlike_for_one_are_told_of() -> None:
    notes: list[str] = []
    combine("a + b", [steering("a"), steering("b")], note=notes.append)
    assert len(notes) == 1
    assert "side by side" in notes[0]


def test_a_plane_for_all_stays_one_for_all() -> None:
    a, b = (steering(name, STREAM, shared_plane=True) for name in "ab")
    made = combine("a - 0.4*b", [a, b])
    assert made.plane == "shared"
    assert len(made.basis) == 1


def test_addition_is_added_exactly_at_every_site() -> None:
    a = steering("a", operator="addition", mean_norm=3.0, angle=0.2)
    b = steering("b", operator="addition", mean_norm=5.0, angle=0.4)
    made = combine("a - 0.5*b", [a, b])
    for number, site in enumerate(made.sites):
        wanted = 0.2 * 3 * b1(a, site) - 0.5 * 0.4 * 5 * b1(b, site)
        np.testing.assert_allclose(made.angle * made.mean_norm[number] * b1(made, site), wanted, atol=1e-6)
    same = combine("1*a", [a])
    np.testing.assert_allclose(same.mean_norm, a.mean_norm, rtol=1e-6)
    assert same.angle == pytest.approx(a.angle)


def test_the_result_says_what_it_is_and_claims_no_range(tmp_path: Path) -> None:
    made = combine("0.3*a  -  0.2*b", [A.with_(angle_min=-9, angle_max=9), B])
    assert made.name == made.positive == "0.3*a - 0.2*b"
    assert "a at 8, b at 6" in made.description
    assert math.isnan(made.angle_min)
    assert math.isnan(made.angle_max)
    made.save(tmp_path / "made.gguf")
    assert Steering.load(tmp_path / "made.gguf").fingerprint == made.fingerprint
    with pytest.raises(SteerError, match="sweep --write"):
        made.at_strength(1)


def test_an_expression_stands_for_a_steering_where_there_is_no_such_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    A.save("a.gguf")
    B.save("b.gguf")
    (found,), dials = named_steerings(["a - 0.5*b:3"])
    assert found.fingerprint == combine("a - 0.5*b", [A, B]).fingerprint
    assert dials == {"a - 0.5*b": 3}
    assert named_steerings(["a - 0.5*b"])[1] == {"a - 0.5*b": found.angle}
    C.save("a - 0.5*b")
    assert find_steerings("a - 0.5*b")[0].name == "c"
    for missing in ("a - 0.5*d", "gone/x.gguf", "~/gone.gguf", "a+gone.gguf", "a +"):
        with pytest.raises(SteerError, match=r"[Nn]o such file"):
            find_steerings(missing)
    save_all([A, B], "d.gguf")
    with pytest.raises(SteerError, match=r"expected one steering in d.gguf"):
        find_steerings("2*d")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("", "1 to 400 characters"),
        ("a +", "column 4"),
        ("a ^ b", "a name, a number"),
        ("a @ b", "no @"),
        ("a % b", "no %"),
        ("a + b # c", "no #"),
        ("~a", "column 1"),
        ("a ** b", "a name, a number"),
        ("a(b)", "a name, a number"),
        ("a.b", "a name, a number"),
        ("__import__('os')", "a name, a number"),
        ("[a for a in b]", "a name, a number"),
        ("a if b else a", "a name, a number"),
        ("a and b", "a name, a number"),
        ("'a'", "a name, a number"),
        ("True*a", "a name, a number"),
        ("1j*a", "a name, a number"),
        ("1e400*a", "a number below a million"),
        ("(" * 400 + "a" + ")" * 400, "expected"),
        ("a" * 401, "1 to 400 characters"),
        ("1 + 2", "names a steering"),
        ("a*b", "no a steering * a steering"),
        ("a + b + 1", "no a steering + a number"),
        ("a ~ 0.5*b", "no a steering ~ a number"),
        ("a / 0 + b", "of 0"),
        ("a * (1/0) + b", "of 0"),
        ("b + 1 / a", "no a number / a steering"),
        ("a + d", "names among a, b"),
        ("a", "'b'"),
        ("a - a + 0*b", "cancels at every site"),
        ("a ~ a + 0*b", "cancels at every site"),
        ("a ~ (b - b)", "common site"),
    ],
)
def test_an_expression_that_is_none_is_refused_in_one_line(expression: str, says: str) -> None:
    with pytest.raises(SteerError) as caught:
        combine(expression, [A, B])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (A.with_(name="b"), "cancels at every site"),
        (B.with_(base=BaseModel("llama", "Other", 6, 32, "ab" * 32)), "for one model, got 'a' for 'Tiny' and 'b' for"),
        (steering("b", operator="addition"), "one operator, got selective"),
        (steering("b", STREAM), "use them side by side: -s a -s b"),
        (B.with_(angle=math.nan), "no default angle"),
    ],
)
def test_steerings_that_do_not_go_together_are_refused(other: Steering, says: str) -> None:
    with pytest.raises(SteerError, match=says):
        combine("a - b", [A, other])


def test_the_kinds_of_refusal_are_kinds_of_error() -> None:
    with pytest.raises(NoEffectError):
        combine("a - a", [A])
    with pytest.raises(MismatchError):
        combine("a - b", [A, B.with_(base=BaseModel("llama", "Tiny", 7, 32))])
    with pytest.raises(SteerError, match="turns to an angle"):
        combine("a", [steering("a", operator="standard")])
    with pytest.raises(SteerError, match="common site"):
        combine("low ~ high", [leaning("low", MEAN, NORMS[:2]), leaning("high", MEAN, NORMS[3:])])


def test_planes_turned_against_each_other_are_refused() -> None:
    mirrored = A.with_(name="b", basis=A.basis * np.float32([[1], [-1]]))
    with pytest.raises(NoEffectError, match="against each other"):
        combine("a + b", [A, mirrored])


# --- on a model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("llama")).gguf_path


def logits(model: Path, steerings: Sequence[Steering], dials: dict[str, float]) -> NDArray[np.float32]:
    llm = SteeredLlama(model, steering=list(steerings), angles=dict(dials), n_ctx=256, n_threads=1, n_threads_batch=1)
    try:
        return llm.logits(TOKENS, 1)
    finally:
        llm.close()


def test_minus_a_at_an_angle_answers_as_a_at_the_opposite(model: Path) -> None:
    a = steering_for(model, name="a").with_(angle=8)
    back = combine("-a", [a], name="back")
    np.testing.assert_allclose(logits(model, [back], {"back": 20}), logits(model, [a], {"a": -20}), atol=2e-5)
    assert np.abs(logits(model, [back], {"back": 20}) - logits(model, [a], {"a": 20})).max() > 0.01


def test_half_of_a_by_default_answers_as_a_at_half_its_dial(model: Path) -> None:
    a = steering_for(model, name="a").with_(angle=30)
    half = combine("0.5*a", [a], name="half")
    np.testing.assert_allclose(logits(model, [half], {"half": half.angle}), logits(model, [a], {"a": 15}), atol=2e-5)


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    A.save(tmp_path / "one.gguf")
    B.save(tmp_path / "two.gguf")
    save_all([A, B], tmp_path / "both.gguf")
    C.with_(name="not a name").save(tmp_path / "odd.gguf")
    return tmp_path


def test_the_verb_writes_what_the_function_makes(files: Path) -> None:
    out = files / "new.gguf"
    made = ran("combine", "x - 0.5*b", "-s", f"x={files}/one.gguf:4", "-s", files / "two.gguf", "-o", out)
    assert made.stdout.strip() == str(out)
    assert "sweep" in made.stderr
    found = Steering.load(out)
    assert found.name == "new"
    wanted = combine("x - 0.5*b", {"x": A, "b": B}, angles={"x": 4})
    assert found.fingerprint == wanted.fingerprint
    assert found.angle == wanted.angle
    assert "by combining" in ran("inspect", out).stdout
    several = ran("combine", "a - b", "-s", files / "both.gguf", "-o", files / "n.gguf", "--name", "mine")
    assert several.exit_code == 0
    assert Steering.load(files / "n.gguf").name == "mine"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("a+b -s both.gguf -o one.gguf", "exists"),
        ("a+b -s both.gguf -o both.gguf --force", "which is read"),
        ("x -s x=both.gguf -o new.gguf", "one steering in"),
        ("odd -s odd.gguf -o new.gguf", "write -s NAME="),
        ("a -s one.gguf -s both.gguf -o new.gguf", "two steerings are called 'a'"),
        ("a -s gone.gguf -o new.gguf", "gone.gguf"),
        ("a+ -s one.gguf -o new.gguf", "column 3"),
    ],
)
def test_a_mistake_in_the_verb_is_one_line(
    files: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, says: str
) -> None:
    monkeypatch.chdir(files)
    found = run("combine", *arguments.split())
    assert found.exit_code == 1
    assert says in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (files / "new.gguf").exists()
