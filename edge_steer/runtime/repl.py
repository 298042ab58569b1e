"""The interpreter of `edge-steer chat`: a line is a question or a command."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import replace

from edge_steer.errors import SteerError
from edge_steer.runtime.answer import Answer, Piece, finish_answer
from edge_steer.runtime.chat import Chat
from edge_steer.runtime.transcript import save_transcript
from edge_steer.user_path import user_path

HELP = """\
/angle 8         turn the dial (the coefficient for addition); acts from the next token on
/angle NAME -5   turn one of several dials
/strength 0.5    turn the dial to a share of the stored range, from -1 to 1
/gate @first:20  when it acts in an answer, from the next on; @all is always; /gate NAME @response for one of several
/off             all dials off
/compare TEXT    answer TEXT at −, off and +, same seed; not remembered
                 (at the ends of the safe range where one was measured, else at the last angle and its opposite)
/read on         read every token of an answer: how far it lies toward the positive end; /read off
/reset           forget the conversation
/save FILE       write the conversation as JSON; `chat --resume FILE` goes on with it
/help            this list
/quit            leave, as does Ctrl-D; Ctrl-C stops an answer"""


class Repl:
    """Answers questions and runs commands, line by line.

    read: gives the next line, raises EOFError at the end. say: told text of answers, as it comes.
    note: told everything else, line by line. show, sum_up: how an answer's piece and its readings are written.
    """

    def __init__(
        self,
        chat: Chat,
        read: Callable[[], str],
        say: Callable[[str], object],
        note: Callable[[str], object],
        *,
        show: Callable[[Piece], str] = lambda piece: piece.text,
        sum_up: Callable[[Answer], str] = lambda _: "",
    ) -> None:
        self.chat, self.read, self.say, self.note, self.show, self.sum_up = chat, read, say, note, show, sum_up
        self.dials = chat.llm.angles
        self._seen = {name: abs(dial) for name, dial in self.dials.items() if dial}  # what /compare goes to
        self._commands: dict[str, Callable[[str], object]] = {
            "/angle": self._angle, "/strength": self._strength, "/gate": self._gate, "/off": self._off,
            "/compare": self._compare, "/read": self._read, "/reset": self._reset, "/save": self._save,
            "/help": lambda _: self.note(HELP),
        }  # fmt: skip

    def run(self) -> None:
        """Until /quit or the end of the input. An error ends a command, Ctrl-C an answer; neither ends the chat."""
        while True:
            try:
                line = self.read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.note("\n/quit leaves")
                continue
            if line in ("/quit", "/exit"):
                return
            try:
                self.do(line)
            except SteerError as error:
                self.note(f"Error: {error}")
            except KeyboardInterrupt:
                self.note("stopped")

    def do(self, line: str) -> None:
        """One line."""
        if line.startswith("/"):
            name, _, rest = line.partition(" ")
            if name not in self._commands:
                raise SteerError(f"expected a command among {', '.join(self._commands)}, /quit, got {name}")
            self._commands[name](rest.strip())
        elif line:
            self._answer(self.chat.ask(line))

    def shown_dials(self) -> str:
        """Every dial, for a person."""
        shown = []
        for steering in self.chat.llm.steerings:
            dial = self.dials[steering.name]
            if dial is None or steering.action(dial) is None:
                shown.append(f"{steering.name} off")
            else:
                gate = self.chat.llm.gates[steering.name]
                turned = "on" if steering.operator == "ablation" else f"{dial:+g}"
                shown.append(f"{steering.name} {turned}{'' if gate is None else gate}")
        return ", ".join(shown)

    def _answer(self, pieces: Generator[Piece, None, Answer]) -> None:
        """Say an answer as it comes, and end its line, also where it is stopped."""
        begun = False

        def say(piece: Piece) -> None:
            nonlocal begun
            begun = True
            self.say(self.show(piece))

        try:
            answer = finish_answer(pieces, say)
            self.say("\n")
            if not begun:
                self.note("the answer is empty: the model ended it with its first token")
            elif answer.readings and (line := self.sum_up(answer)):
                self.note(line)
        except KeyboardInterrupt:
            if begun:
                self.say("\n")
            else:
                self.note("")  # the terminal shows ^C where the answer would stand
            raise

    def _angle(self, rest: str) -> None:
        if not self.dials:
            raise SteerError("there is no steering to turn; start the chat with -s FILE:ANGLE")
        name, _, number = rest.rpartition(" ")
        name = name.strip()
        if rest:
            if not name and len(self.dials) > 1:
                raise SteerError(f"expected /angle NAME {number}, with a name among {', '.join(self.dials)}")
            try:
                dial = None if number == "off" else float(number)
            except ValueError:
                raise SteerError(f"expected /angle NUMBER or /angle NAME NUMBER, got /angle {rest}") from None
            name = name or next(iter(self.dials))
            self.dials[name] = dial
            if dial:
                self._seen[name] = abs(dial)
        self.note(self.shown_dials())

    def _strength(self, rest: str) -> None:
        name, _, number = rest.rpartition(" ")
        steering = next((each for each in self.chat.llm.steerings if each.name == (name.strip() or each.name)), None)
        if steering is None or (not name and len(self.dials) > 1):
            known = ", ".join(self.dials) or "(none)"
            raise SteerError(f"expected /strength NUMBER or /strength NAME NUMBER, of {known}; got /strength {rest}")
        try:
            strength = float(number)
        except ValueError:
            raise SteerError(f"expected a number from -1 to 1, got /strength {rest}") from None
        self._angle(f"{steering.name} {steering.at_strength(strength)}")

    def _gate(self, rest: str) -> None:
        name, sign, conditions = rest.partition("@")
        if rest and (not sign or (not name.strip() and len(self.dials) != 1)):
            known = ", ".join(self.dials) or "(none)"
            raise SteerError(f"expected /gate @response or /gate NAME @response, of {known}; got /gate {rest}")
        if rest:
            self.chat.llm.gates.set({name.strip() or next(iter(self.dials)): f"@{conditions}"})
        self.note(self.shown_dials() or "no steering")

    def _off(self, _: str) -> None:
        self.dials.update(dict.fromkeys(self.dials))
        self.note(self.shown_dials() or "no steering")

    def _compare(self, text: str) -> None:
        if not text:
            raise SteerError("expected /compare TEXT, got no text")
        if not (ends := self._ends()):
            raise SteerError("there is no angle to compare at; set one with /angle first")
        before = dict(self.dials)
        answered = set()
        try:
            for position in range(3):
                for name, positions in ends.items():
                    self.dials[name] = positions[position]
                # An ablation is on or off: its − and + are one.
                if (actions := self.dials.actions()) not in answered:
                    answered.add(actions)
                    self.say(f"[{self.shown_dials()}] ")
                    self._answer(self.chat.try_out(text))
        finally:
            self.dials.update(before)

    def _ends(self) -> dict[str, tuple[float, None, float]]:
        """What /compare turns each dial to: the ends of its safe range, else the last angle seen and its opposite.

        Of several dials, one that never was on stays off.
        """
        found: dict[str, tuple[float, None, float]] = {}
        for steering in self.chat.llm.steerings:
            name, low, high = steering.name, steering.angle_min, steering.angle_max
            if not (math.isnan(low) or math.isnan(high)) and (name in self._seen or len(self.dials) == 1):
                found[name] = (low, None, high)
            elif name in self._seen:
                found[name] = (-self._seen[name], None, self._seen[name])
        return found

    def _read(self, rest: str) -> None:
        if rest not in ("on", "off"):
            raise SteerError(f"expected /read on or /read off, got /read {rest}".rstrip())
        names = tuple(self.dials) if rest == "on" else ()
        if rest == "on" and not names:
            raise SteerError("there is no steering to read by; start the chat with -s FILE")
        self.chat.llm.token_readings.check(names)
        self.chat.sampling = replace(self.chat.sampling, read=names)
        self.note(f"reading {', '.join(names)}" if names else "not reading")

    def _reset(self, _: str) -> None:
        self.chat.turns.clear()
        self.note("the conversation is forgotten")

    def _save(self, file: str) -> None:
        if not file:
            raise SteerError("expected /save FILE, got no file")
        path = user_path(file)
        save_transcript(self.chat, path)
        self.note(f"saved {path}")
