"""What the pages say of the code is so: keys of the file, verbs and options, names, paths."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
import pytest

from edge_steer import FormatError, Steering
from edge_steer.architectures import ARCHITECTURES, MODEL_TYPES
from edge_steer.cli.main import VERBS, main
from edge_steer.converters.source import FAMILIES
from edge_steer.gguf_metadata import Value, read_gguf
from edge_steer.provenance import BaseModel, Made
from edge_steer.sites import Site
from edge_steer.steering import metadata, save_all
from edge_steer.steering_file import add_metadata

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))])
SITES = (Site(0, "attn_norm"), Site(1, "attn_norm"))


def page_id(page: Path) -> str:
    return page.name


# --- docs/file-format.md --------------------------------------------------------------------------------------------


def key_table() -> dict[str, list[str]]:
    """The rows of the table of keys: key to its other cells."""
    rows = re.findall(r"^\| `((?:steering|general)\.[^`]*)` \|(.*)\|$", (DOCS / "file-format.md").read_text(), re.M)
    assert len(dict(rows)) == len(rows), "a key twice"
    return {key: [cell.strip() for cell in cells.split("|")] for key, cells in rows}


def full_steering(name: str, **made: Any) -> Steering:
    """A steering of which nothing is left out."""
    numbers = (0.5, 1.5)
    return Steering(
        name, "selective", "local", SITES, [True, False], [0, 1], np.stack([np.eye(4)[:2], np.eye(4)[2:]]),
        BaseModel("llama", "Tiny", 2, 4, "ab" * 32), separation=numbers, mean_norm=numbers,
        class_means=[numbers, numbers], description="text",
        threshold=0.5, gate="@first:2", angle=4, angle_min=-8, angle_max=8, provisional=True,
        made=Made("native", "Tiny", "cd" * 32, "0.1.0", "2026-01-31", 24, 23, **made),
    )  # fmt: skip


def written_keys(path: Path) -> dict[str, Value]:
    choices = {"orthogonal_to": ("refusal",), "candidates": ("a", "b")}
    ends = dict.fromkeys(("candidate_min", "candidate_max", "candidate_negative", "candidate_positive"), (-1.0, 1.0))
    one = full_steering("one", **choices, **ends)
    two = replace(one, name="two", made=replace(one.made, date="2026-02-01"))
    save_all([one, two], path)
    values = read_gguf(path, lambda key: True).values
    return {re.sub(r"^steering\.\d+\.", "steering.{i}.", key): value for key, value in values.items()}


def named_type(value: Value) -> str:
    names = {"STRING": "string", "UINT32": "u32", "FLOAT32": "f32", "BOOL": "bool"}
    return names[value.type.name] if value.item is None else f"[{names[value.item.name]}]"


def test_every_key_of_a_steering_file_stands_in_the_table_with_its_type_and_no_other_does(tmp_path: Path) -> None:
    written = {key: named_type(value) for key, value in written_keys(tmp_path / "s.gguf").items()}
    assert {key: cells[0].split(",")[0] for key, cells in key_table().items()} == written


@pytest.mark.parametrize("key", [key for key in key_table() if key.startswith("steering.")])
def test_a_file_without_a_key_is_refused_where_the_table_says_so(tmp_path: Path, key: str) -> None:
    values = metadata([full_steering("one")])
    values.pop(key.replace("{i}", "0"), None)
    writer = gguf.GGUFWriter(tmp_path / "s.gguf", "edge-steer")
    add_metadata(writer, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    if key_table()[key][1] == "**refused**":
        with pytest.raises(FormatError):
            Steering.load(tmp_path / "s.gguf")
    else:
        Steering.load(tmp_path / "s.gguf")


# --- docs/cli.md and docs/python.md ---------------------------------------------------------------------------------


def test_the_page_of_commands_has_every_verb_and_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    sections = dict(re.findall(r"^## (\w+)$(.*?)(?=^## |\Z)", import_page(), re.M | re.S))
    assert tuple(sections) == VERBS
    for verb, text in sections.items():
        for option in options(main.get_command(click.Context(main), verb)):
            assert re.search(rf"^\| `[^`]*(?<![\w-]){re.escape(option)}(?![\w-])[^`]*` \| \S", text, re.M), option


def import_page() -> str:
    page: str = import_module("cli_reference").on_page_markdown((DOCS / "cli.md").read_text())
    sys.modules.pop("cli_reference")
    return page


def options(command: click.Command | None) -> list[str]:
    assert command is not None
    below = command.commands.values() if isinstance(command, click.Group) else ()
    own = [name for each in command.params if isinstance(each, click.Option) for name in each.opts]
    return own + [name for each in below for name in options(each)]


NAMES = re.findall(r"^::: (\S+)$", (DOCS / "python.md").read_text(), re.M)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_page_of_python_names_is_there_and_explained(name: str) -> None:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            module = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        found = attrgetter(".".join(parts[count:]))(module) if parts[count:] else module
        assert found.__doc__
        return
    pytest.fail(f"no module {name}")


# --- docs/models.md -------------------------------------------------------------------------------------------------


def test_the_page_of_models_has_every_architecture_and_what_works_on_it() -> None:
    text = (DOCS / "models.md").read_text()
    table = {
        name: (tuple(re.findall(r"`(\w+)`", types)), stream == "yes", converts == "yes")
        for name, types, stream, converts in re.findall(r"^\| `([\w-]+)` \| (.*) \| (\w+) \| (\w+) \|$", text, re.M)
    }
    converted = {family.arch for family in FAMILIES.values()}
    exported = {
        name: (
            tuple(type for type, known in MODEL_TYPES.items() if known == name),
            not known.post_norms and not known.tied_only,
            name in converted,
        )
        for name, known in ARCHITECTURES.items()
        if all(kind.readers is not None for kind in known.kinds.values())
    }
    assert table == exported
    live = text.split("\n## Steered live\n")[1].split("\n## ")[0]
    assert re.findall(r"`([\w-]+)`", live) == sorted(ARCHITECTURES.keys() - exported)


# --- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(
        r"(?<![\w/.-])((?:edge_steer|converters|native|tests|benchmarks|docs|models)/[\w./-]*\w)", page.read_text()
    )
    missing = [path for path in named if "NAME" not in path and not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_file_that_a_page_links_to_exists(page: Path) -> None:
    linked = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in linked if not (page.parent / target).exists()] == []
