"""The field `steering` of a request: every form, and what is refused."""

from __future__ import annotations

import json

import pytest
from planted import random_steering

from edge_steer.provenance import BaseModel
from edge_steer.serve.errors import ApiError, error_body
from edge_steer.serve.steering_field import (
    BadRequest,
    aliases,
    describe,
    parse_alias,
    parse_named,
    parse_steering,
)
from edge_steer.sites import Site
from edge_steer.steering import Steering

BASE = BaseModel("llama", "tiny", 2, 8)
SITES = [Site(1, "attn_norm")]


def _steering(name: str, **changes: object) -> Steering:
    return random_steering(BASE, SITES, name=name).with_(**changes)


HAPPY = _steering("happy", angle=4.1, angle_min=-8.2, angle_max=9.0, positive="cheerful", negative="gloomy")
FORMAL = _steering("formal")
NO_REFUSAL = random_steering(BASE, SITES, "ablation", name="refusal")
BOTH = [HAPPY, FORMAL]


@pytest.mark.parametrize(
    ("value", "happy", "formal"),
    [
        ({"happy": 8}, 8, None),
        ({"happy": 8, "formal": -4.5}, 8, -4.5),
        ({"happy": None}, None, None),
        ({"happy": 0}, 0, None),
        ({"happy": {"strength": 0.5}}, 4.5, None),
        ({"happy": {"strength": -1}}, -8.2, None),
        ({}, None, None),
        ("happy:8,formal:-4", 8, -4),
        (" happy : 8 , formal:-4 ", 8, -4),
        ("happy", 4.1, None),
        ("happy,formal:1e1", 4.1, 10),
        ("", None, None),
        ("off", None, None),
        ("happy:off,formal:2", None, 2),
        (None, None, None),
    ],
)
def test_every_form_gives_the_dial_of_every_steering_in_order(
    value: object, happy: float | None, formal: float | None
) -> None:
    found = parse_steering(value, BOTH)
    assert list(found) == ["happy", "formal"]
    assert found == pytest.approx({"happy": happy, "formal": formal})


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({"sad": 8}, "'sad'"),
        ({"happy": True}, "True"),
        ({"happy": "8"}, "'8'"),
        ({"happy": [8]}, "[8]"),
        ({"happy": {"strength": True}}, "strength"),
        ({"happy": {"strength": 1.5}}, "1.5"),
        ({"happy": {"strength": float("nan")}}, "nan"),
        ({"happy": {"strength": 1, "angle": 2}}, "angle"),
        ({"formal": {"strength": 0.5}}, "safe range"),
        ({"happy": float("nan")}, "nan"),
        ({"happy": float("inf")}, "inf"),
        ({"happy": 10**400}, "from -360 to 360"),
        ({"happy": 361}, "from -360 to 360"),
        ("happy:nan", "nan"),
        ("happy:1e999", "1e999"),
        ("happy:", "''"),
        ("happy:8,happy:9", "twice"),
        ("formal", "no default"),
        ("../../happy.gguf:8", "happy.gguf"),
        (",", "''"),
        ("happy:" + "1" * 3000, "characters"),
        (8, "got 8"),
        (True, "True"),
        ([{"happy": 8}], "got ["),
    ],
)
def test_what_cannot_be_set_is_refused_in_one_line_that_names_it(value: object, word: str) -> None:
    with pytest.raises(BadRequest) as error:
        parse_steering(value, BOTH)
    assert error.value.param == "steering"
    assert word in error.value.message
    assert len(error.value.message) < 300
    assert "\n" not in error.value.message


def test_only_the_steerings_named_are_in_parse_named() -> None:
    assert parse_named({"formal": 2}, BOTH) == {"formal": 2}
    assert parse_named("happy:1", BOTH) == {"happy": 1}
    assert parse_named(None, BOTH) == {"happy": None, "formal": None}


def test_a_steering_called_off_is_a_steering() -> None:
    off = _steering("off", angle=3.0)
    assert parse_steering("off", [off]) == {"off": 3.0}


def test_a_model_with_dials_is_told_from_a_model_whose_name_holds_an_at() -> None:
    assert parse_alias("tiny", BOTH) == ("tiny", None)
    assert parse_alias("tiny@happy:8", BOTH) == ("tiny", {"happy": 8, "formal": None})
    assert parse_alias("tiny@off", BOTH) == ("tiny", {"happy": None, "formal": None})
    assert parse_alias("tiny@", BOTH) == ("tiny", {"happy": None, "formal": None})
    assert parse_alias("a@b", BOTH, "a@b") == ("a@b", None)
    assert parse_alias("a@b@formal:1", BOTH, "a@b") == ("a@b", {"happy": None, "formal": 1})
    assert parse_alias("other@v1@formal:1", BOTH, "tiny") == ("other@v1", {"happy": None, "formal": 1})
    with pytest.raises(BadRequest, match="hapy") as error:
        parse_alias("tiny@hapy:8", BOTH)
    assert error.value.param == "model"


def test_aliases_are_the_ends_and_the_halves_of_each_range_and_can_be_read_back() -> None:
    steerings = [HAPPY, FORMAL, NO_REFUSAL]
    found = aliases("tiny", steerings)
    dials = ["off", "happy:-8.2", "happy:-4.1", "happy:4.5", "happy:9", "refusal"]
    assert found == [f"tiny@{each}" for each in dials]
    assert all(parse_alias(each, steerings)[1] is not None for each in found)
    assert aliases("tiny", []) == []


def test_the_list_of_steerings_is_json_and_tells_unmeasured_from_zero() -> None:
    body = json.loads(json.dumps(describe([HAPPY, FORMAL], {"happy": 4.099999904632568}, "tiny"), allow_nan=False))
    happy, formal = body["steerings"]
    assert body["model"] == "tiny"
    assert (happy["negative_name"], happy["positive_name"]) == ("gloomy", "cheerful")
    assert (happy["default"], happy["file_default"], happy["min"], happy["max"]) == (4.1, 4.1, -8.2, 9.0)
    assert (formal["default"], formal["file_default"], formal["min"], formal["max"]) == (None, None, None, None)
    assert (formal["negative_name"], formal["unit"], formal["operator"]) == ("", "degrees", "selective")
    assert describe([NO_REFUSAL], {})["steerings"][0]["unit"] == "coefficient"


def test_an_error_has_openais_four_parts() -> None:
    error = ApiError(503, "full", code="queue_full", headers={"Retry-After": "1"})
    parts = {"message": "full", "type": "invalid_request_error", "param": None, "code": "queue_full"}
    assert error.body == {"error": parts} == error_body("full", code="queue_full")
    assert (error.status, str(error), error.headers) == (503, "full", {"Retry-After": "1"})
