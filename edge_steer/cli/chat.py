"""`edge-steer chat`: a conversation in the terminal, with the dial live."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_steer.cli import options
from edge_steer.errors import SteerError

if TYPE_CHECKING:
    from edge_steer.runtime.chat import Chat

HELP = """\
/angle 8         turn the dial (the coefficient for addition); acts from the next token on
/angle NAME -5   the dial of one steering of several
/off             all dials off
/compare TEXT    answer TEXT at −, off and +, same seed; not remembered
/reset           forget the conversation
/save FILE       write the conversation as JSON
/help            this list
/quit            leave (also Ctrl-D); Ctrl-C stops an answer"""


class Repl:
    """Reads lines, runs commands, prints answers. Answers go to stdout, everything else to stderr."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.llm = chat.llm
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.last_dials = {name: dial for name, dial in self.llm.angles.items() if dial}
        self.commands: dict[str, Callable[[str], None]] = {
            "angle": self.angle, "off": self.off, "compare": self.compare, "reset": self.reset, "save": self.save,
            "help": lambda _: self.note(HELP),
        }  # fmt: skip

    def run(self) -> None:
        if self.interactive:
            import readline  # noqa: F401  line editing and history for input()

            self.note(f"{self.dials()}. /help lists the commands.")
        while True:
            try:
                line = self.read()
            except EOFError:
                if self.interactive:
                    self.note("")
                return
            except KeyboardInterrupt:
                self.note("\n/quit leaves")
                continue
            if line in ("/quit", "/exit"):
                return
            try:
                self.do(line)
            except SteerError as error:
                self.note(f"error: {error}")

    def read(self) -> str:
        if self.interactive:
            return input("> ").strip()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.strip()

    def do(self, line: str) -> None:
        if not line:
            return
        if not line.startswith("/"):
            self.say(line)
            return
        name, _, rest = line[1:].partition(" ")
        command = self.commands.get(name)
        if command is None:
            raise SteerError(f"expected a command among /{', /'.join(self.commands)}, /quit, got /{name}")
        command(rest.strip())

    def say(self, text: str) -> None:
        dropped = self.chat.make_room(text)
        if dropped:
            self.note(f"the context is full: dropped the {dropped} oldest messages")
        self.stream(self.chat.ask(text))

    def stream(self, pieces: Any) -> None:
        """Print an answer as it comes; Ctrl-C stops it and keeps what was said."""
        try:
            for piece in pieces:
                click.echo(piece, nl=False)
        except KeyboardInterrupt:
            pieces.close()
            self.note(" [stopped]", nl=False)
        click.echo()

    def angle(self, rest: str) -> None:
        name, _, number = rest.rpartition(" ")
        names = list(self.llm.angles)
        if not names:
            raise SteerError("no steering is loaded; start with -s FILE:ANGLE")
        if not number:
            self.note(self.dials())
            return
        if not name and len(names) > 1:
            raise SteerError(f"expected /angle NAME {number}, with a name among {', '.join(names)}")
        try:
            dial = None if number == "off" else float(number)
        except ValueError:
            raise SteerError(f"expected a number or off, got {number!r}") from None
        self.llm.angles[name.strip() or names[0]] = dial
        if dial:
            self.last_dials[name.strip() or names[0]] = dial
        self.note(self.dials())

    def off(self, _: str) -> None:
        for name in self.llm.angles:
            self.llm.angles[name] = None
        self.note(self.dials())

    def compare(self, text: str) -> None:
        if not text:
            raise SteerError("expected /compare TEXT")
        if not self.last_dials:
            raise SteerError("no dial to mirror yet; set one with /angle first")
        before = dict(self.llm.angles)
        from edge_steer.runtime.chat import stream_answer

        if dropped := self.chat.make_room(text):
            self.note(f"the context is full: dropped the {dropped} oldest messages")
        try:
            for sign, mark in ((-1, "−"), (0, "off"), (1, "+")):
                self.llm.angles = {
                    name: sign * abs(self.last_dials[name]) if sign and name in self.last_dials else None for name in before
                }
                self.note(f"[{mark}] {self.dials()}")
                self.stream(stream_answer(self.llm, self.chat.messages({"role": "user", "content": text}), self.chat.sampling))
        finally:
            self.llm.angles = before

    def reset(self, _: str) -> None:
        self.chat.turns.clear()
        self.note("conversation forgotten")

    def save(self, file: str) -> None:
        if not file:
            raise SteerError("expected /save FILE")
        path = Path(file).expanduser()
        if path.exists():
            raise SteerError(f"{path} exists; choose another name")
        record = {"messages": self.chat.messages(), "angles": dict(self.llm.angles), "model": Path(self.llm.model_path).name}
        temporary = None
        try:
            with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".chat", delete=False, encoding="utf-8") as out:
                temporary = out.name
                json.dump(record, out, ensure_ascii=False, indent=2)
            os.replace(temporary, path)
        except OSError as error:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            raise SteerError(f"{path}: {error.strerror}") from None
        self.note(f"saved {path}")

    def dials(self) -> str:
        if not self.llm.angles:
            return "no steering"
        return ", ".join(f"{name} {'off' if dial is None else f'{dial:+g}'}" for name, dial in self.llm.angles.items())

    def note(self, text: str, nl: bool = True) -> None:
        click.echo(text, err=True, nl=nl)


@click.command()
@options.model_option
@options.steering_options
@click.option("--system", help="System prompt.")
@options.sampling_options
@options.run_options
def chat(
    model: str,
    steering: tuple[str, ...],
    angle: float | None,
    strength: float | None,
    scope: str,
    system: str | None,
    ctx: int | None,
    gpu_layers: int,
    threads: int | None,
    seed: int,
    **sampling: Any,
) -> None:
    """Chat in the terminal; /angle turns the dial while you talk.

    \b
    edge-steer chat -m smollm2-135m -s happy.gguf:8
    """
    from edge_steer.runtime.chat import Chat

    llm = options.open_model(
        model, steering, angle=angle, strength=strength, scope=scope,
        ctx=ctx, gpu_layers=gpu_layers, threads=threads, seed=seed,
    )  # fmt: skip
    Repl(Chat(llm, options.sampling(seed=seed, **sampling), system)).run()
