"""The page of commands, made from click: a MkDocs hook that puts every verb with its options in place of a mark."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import click

from edge_steer.cli.main import main

MARK = "<!-- every verb -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this for every page."""
    return markdown.replace(MARK, "\n".join(verbs())) if MARK in markdown else markdown


def verbs() -> Iterator[str]:
    """Markdown of every verb, in the order of `edge-steer --help`."""
    with click.Context(main, info_name="edge-steer", **main.context_settings) as ctx:
        for name in main.list_commands(ctx):
            command = main.get_command(ctx, name)
            assert command is not None, name
            yield from verb(command, click.Context(command, info_name=name, parent=ctx), level=2)


def verb(command: click.Command, ctx: click.Context, level: int) -> Iterator[str]:
    """Markdown of one command and of those below it."""
    usage = " ".join(command.collect_usage_pieces(ctx))
    yield f"\n{'#' * level} {ctx.info_name}\n"
    yield from paragraphs(command.help or "")
    yield f"\n```text\n{ctx.command_path} {usage}\n```\n"
    yield "| option | meaning |\n|---|---|"
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None and isinstance(parameter, click.Option):  # arguments stand in the usage
            names, text = record
            yield f"| `{names}` | {text.replace('|', '&#124;')} |"  # within `` a bar ends no cell
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            below = command.get_command(ctx, name)
            assert below is not None, name
            yield from verb(below, click.Context(below, info_name=name, parent=ctx), level + 1)


def paragraphs(text: str) -> Iterator[str]:
    """A command's help as Markdown. click leaves a paragraph behind \\b as it stands: examples, lists."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = paragraph.strip("\n").split("\n")
        as_it_stands = lines[0].strip() == "\b"
        yield "\n".join(["```text", *lines[1:], "```"] if as_it_stands else lines) + "\n"
