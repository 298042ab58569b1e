"""`edge-steer VERB`: finds the verb, turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import io
import keyword
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from edge_steer._version import __version__
from edge_steer.errors import SteerError

VERBS = (
    "demo", "calibrate", "inspect", "sweep", "generate", "chat", "read", "serve", "export", "convert", "import",
    "verify", "presets", "models", "doctor",
)  # fmt: skip


class Verbs(click.Group):
    """The verbs, each loaded from the file of its name when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        python_name = f"{name}_" if keyword.iskeyword(name) else name
        command: click.Command = getattr(importlib.import_module(f"edge_steer.cli.{python_name}"), python_name)
        return command

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _one_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    """Errors that a user can cause end the program with one line, not with a traceback."""
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()
    except SteerError as error:
        raise _failure(str(error)) from None
    except KeyboardInterrupt:
        raise _failure("interrupted", 130) from None
    except BrokenPipeError:
        _drop_output()
        raise click.exceptions.Exit(1) from None
    except OSError as error:
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        raise _failure(f"{where}{error.strerror or error}") from None
    except MemoryError:
        raise _failure("out of memory; try a smaller model or --ctx") from None


def _failure(text: str, code: int = 1) -> click.ClickException:
    failure = click.ClickException(" ".join(text.split()))
    setattr(failure, "exit_code", code)  # noqa: B010  click declares it for the class
    return failure


def _drop_output() -> None:
    """Where standard output takes no more, leave Python nothing to fail on at exit."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(number: int, _: object) -> None:
    """Ended from outside, or by a terminal that closed: unwind, so that no half-written file stays."""
    raise SystemExit(128 + number)


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"note: {message}", err=True)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edge-steer")
def main() -> None:
    """Steer quantized language models on your own laptop.

    Try `edge-steer demo` first.
    """
    warnings.showwarning = _note
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _leave)
    for stream in (sys.stdin, sys.stdout):
        # A byte that is no text, or a sign that the terminal cannot show, ends no conversation. What is no terminal
        # holds UTF-8, as all files here do: Windows has another code page for pipes, which knows few of the signs.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace", encoding=None if stream.isatty() else "utf-8")


if __name__ == "__main__":
    main()
