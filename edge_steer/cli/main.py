"""`edge-steer VERB`: finds the verb, turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import Any

import click

from edge_steer._version import __version__
from edge_steer.errors import SteerError

VERBS = ("demo", "calibrate", "inspect", "generate", "chat", "presets", "models", "doctor")


class Verbs(click.Group):
    """The verbs, each loaded from the file of its name when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = getattr(importlib.import_module(f"edge_steer.cli.{name}"), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SteerError as error:
            raise _failure(str(error)) from None
        except (KeyboardInterrupt, EOFError):
            raise _failure("interrupted", 130) from None
        except BrokenPipeError:
            # The reader of our output left; leave Python nothing to flush.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(1) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise _failure(f"{where}{error.strerror or error}") from None
        except MemoryError:
            raise _failure("out of memory; try a smaller model or --ctx") from None


def _failure(text: str, code: int = 1) -> click.ClickException:
    failure = click.ClickException(" ".join(text.split()))
    failure.exit_code = code
    return failure


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"note: {message}", err=True)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edge-steer")
def main() -> None:
    """Steer quantized language models on your own laptop.

    Try `edge-steer demo` first.
    """
    warnings.showwarning = _note
