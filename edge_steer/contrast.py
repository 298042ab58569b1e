"""What a steering is computed from: prompts of two sides, the presets that ship, and the chat template around each.

Tokens. Both recorders and generation must see the same ones, so a rendered text is tokenized in one way:

    llama.cpp     SteeredLlama.text_tokens
    transformers  TorchRecorder.text_tokens

Most templates write the BOS themselves and must not get another; where the text has none, the tokenizer adds its own,
if it is one that does. Nothing else that it may add belongs to a prompt: an EOS behind it would end the answer.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from edge_steer.errors import FormatError, SteerError, shown

PRESETS = Path(__file__).parent / "presets"
PROMPT_KEYS = ("prompt", "system", "prefix")
LONGEST_LINE = 100_000  # characters
_LOPSIDED = 10  # times as many prompts on one side as on the other
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0]"
)
LARGEST_FILE = 1 << 28  # bytes: what looks like no more than a file may be a hole of a terabyte

# Contents are stripped: a model begins its answer with a space of its own, and two would be other tokens than it wrote.
PLAIN_FORMS = {"system": "{}\n\n", "user": "{}\nAnswer:", "assistant": " {}\n\n"}

# --- prompts ------------------------------------------------------------------------------------------------------


def check_text(what: str, value: object) -> None:
    """Raise FormatError where `value` is no text that says something."""
    if not isinstance(value, str):
        raise FormatError(f"expected text as {what}, got {shown(value)}; write it as a string")
    if not value.strip():
        raise FormatError(f"expected text as {what}, got a blank; write some or leave it out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FormatError(f"expected Unicode text as {what}, got half of a surrogate pair: {shown(value)}") from None


@dataclass(frozen=True)
class Prompt:
    """What a user says, the system message over it, how the answer begins. Raises FormatError where one is blank.

    origin: the file and line that it comes from, where it comes from one.
    """

    prompt: str
    system: str | None = None
    prefix: str | None = None
    origin: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in PROMPT_KEYS:
            value = getattr(self, name)
            if name == "prompt" or value is not None:
                check_text(name, value)

    def messages(self) -> list[dict[str, str]]:
        """The chat so far: the system message if there is one, and the user's. `prefix` is not in it."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, {"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class Probe:
    """A prompt with an answer from each side: how far their log-probabilities lie apart measures a steering."""

    prompt: str
    positive: str
    negative: str

    def __post_init__(self) -> None:
        for name in ("prompt", "positive", "negative"):
            check_text(name, getattr(self, name))


@dataclass(frozen=True)
class PromptSet:
    """The two sides that a steering is computed from. In a preset, prompt i of one side pairs with i of the other.

    Raises SteerError where a side is empty or both hold the same prompts.
    """

    name: str
    description: str
    positive_name: str
    negative_name: str
    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]
    probes: tuple[Probe, ...] = ()

    def __post_init__(self) -> None:
        if not (self.positive and self.negative):
            side = "negative" if self.positive else "positive"
            raise SteerError(f"prompts {self.name!r}: expected prompts on both sides, got no {side} one; add some")
        # The class means know no order.
        if Counter(self.positive) == Counter(self.negative):
            raise SteerError(f"prompts {self.name!r}: the two sides are the same; give two that differ")

    def warnings(self) -> list[str]:
        """What makes a steering of these prompts doubtful, a line each."""
        found = []
        sides = {"positive": self.positive, "negative": self.negative}
        for name, side in sides.items():
            if len(side) == 1:
                found.append(f"one {name} prompt: the direction is that of its words; give some twenty")
            if blank := [prompt for prompt in side if not _INVISIBLE.sub("", prompt.prompt).strip()]:
                found.append(f"{len(blank)} {name} prompts look blank (such as {blank[0].prompt!a})")
        counts = sorted(map(len, sides.values()))
        if counts[1] >= _LOPSIDED * counts[0] and counts[0] > 1:
            found.append(
                f"{len(self.positive)} positive prompts against {len(self.negative)}: give about as many of each"
            )
        if both := set(self.positive) & set(self.negative):
            some = shown(min(each.prompt for each in both))
            found.append(f"{len(both)} prompts are on both sides (such as {some}), where they cancel out")
        return found

    def first(self, count: int) -> PromptSet:
        """The first `count` prompts of each side."""
        return replace(self, positive=self.positive[:count], negative=self.negative[:count])

    @cached_property
    def sha256(self) -> str:
        """Hash of every prompt of both sides, in order: counts and lengths go in, so that no two sets run together."""
        digest = hashlib.sha256()
        for side in (self.positive, self.negative):
            digest.update(len(side).to_bytes(8, "little"))
            for prompt in side:
                for text in (prompt.prompt, prompt.system, prompt.prefix):
                    data = b"" if text is None else text.encode()  # no text is blank, so 0 bytes are None alone
                    digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


# --- files --------------------------------------------------------------------------------------------------------


def read_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """The prompts in a UTF-8 file, in order; blank lines are skipped.

    .txt:   one prompt a line, blanks around it dropped.
    .jsonl: one object a line: "prompt", and if wanted "system" and "prefix" (how the answer begins).
    .csv:   a header with these names, one prompt a row; an empty cell is none.

    Raises SteerError where there is no such file, FormatError with file and line where it holds anything else.
    """
    path = Path(path)
    read = {".txt": _txt_records, ".jsonl": _jsonl_records, ".csv": _csv_records}.get(path.suffix.lower())
    if read is None:
        raise SteerError(f"{path}: expected a file named .txt, .jsonl or .csv, got {path.suffix or 'no suffix'}")
    prompts = []
    for number, record in read(path):
        _check_keys(path, number, record)
        prompts.append(replace(_made(Prompt, path, number, record), origin=f"{path}:{number}"))
    if not prompts:
        raise FormatError(f"{path}: expected prompts, got none; write at least one")
    return tuple(prompts)


def read_probes(path: str | Path) -> tuple[Probe, ...]:
    """The probes in a .jsonl file: "prompt", and an answer of each side, "positive" and "negative".

    Raises SteerError where there is no such file, FormatError with file and line where it holds anything else.
    """
    path = Path(path)
    found = tuple(_made(Probe, path, number, record) for number, record in _jsonl_records(path))
    if not found:
        raise FormatError(f"{path}: expected probes, got none; write at least one")
    return found


def prompt_set(positive_path: str | Path, negative_path: str | Path, name: str) -> PromptSet:
    """The prompts of two files as two sides, named after the files. Raises what read_prompts and PromptSet raise."""
    positive, negative = Path(positive_path), Path(negative_path)
    description = f"{positive.name} against {negative.name}"
    return PromptSet(name, description, positive.stem, negative.stem, read_prompts(positive), read_prompts(negative))


def _check_keys(path: Path, number: int, keys: Iterable[str]) -> None:
    unknown = [key for key in keys if key not in PROMPT_KEYS]
    if unknown:
        names = ", ".join(map(shown, unknown[:5]))
        raise FormatError(f"{path}:{number}: expected the keys {', '.join(PROMPT_KEYS)}, got {names}; remove it")


def _made(kind: Callable[..., Any], path: Path, number: int, record: Mapping[str, object]) -> Any:
    """kind(**record), its errors told with file and line."""
    try:
        return kind(**{"prompt": None, **record})
    except FormatError as error:
        raise FormatError(f"{path}:{number}: {error}") from None
    except TypeError:
        got = ", ".join(map(shown, record))
        raise FormatError(f"{path}:{number}: expected the keys prompt, positive, negative, got {got}") from None


def read_text(path: Path) -> str:
    """The text of a file, lines ended by \\n. Raises SteerError where none can be read, FormatError where not text."""
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise SteerError(f"{path}: expected a file, got {got}; check the path")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise FormatError(f"{path}: expected at most {LARGEST_FILE} bytes, got {path.stat().st_size}; split it")
        data = path.read_bytes()
    except OSError as error:
        raise SteerError(f"{path}: expected a file to read, got {error.strerror}; check its permissions") from None
    if not data:
        raise FormatError(f"{path}: expected prompts, got an empty file")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise FormatError(f"{path}:1: expected UTF-8, got UTF-16; save it as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    nul = data.find(b"\0")
    if nul >= 0:
        number = data.count(b"\n", 0, nul) + 1
        raise FormatError(f"{path}:{number}: expected text, got a binary file (it holds a NUL byte)")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        number, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise FormatError(f"{path}:{number}: expected UTF-8, got byte {byte:#04x}; save it as UTF-8") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line with its number, from 1. (str.splitlines would also break at characters that JSON strings may hold.)"""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if len(line) > LONGEST_LINE:
            raise FormatError(f"{path}:{number}: expected a line of at most {LONGEST_LINE} characters, got {len(line)}")
        yield number, line


def _txt_records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in _lines(path):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _jsonl_records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_each_once)
        except FormatError as error:
            raise FormatError(f"{path}:{number}: {error}") from None
        except (ValueError, RecursionError) as error:
            # ValueError: a number of too many digits raises one that is no JSONDecodeError.
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "out of bounds"
            raise FormatError(f"{path}:{number}: expected a JSON object, got invalid JSON ({reason})") from None
        if not isinstance(record, dict):
            raise FormatError(f"{path}:{number}: expected a JSON object, got {shown(record)}")
        yield number, record


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; json takes the last of two values of one key, in silence."""
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise FormatError(f"expected every key once, got {shown(twice)} twice; remove one")
    return record


def _csv_records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    rows = csv.reader(io.StringIO("\n".join(line for _, line in _lines(path))), strict=True)
    header: list[str] | None = None
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise FormatError(f"{path}:{number}: expected a CSV row, got {error}") from None
        if row is None:
            return
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = [cell.strip() for cell in row]
            if "prompt" not in header:
                raise FormatError(f"{path}:{number}: expected a header with a prompt column, got {shown(header)}")
            _check_keys(path, number, header)
            if len(set(header)) < len(header):
                raise FormatError(f"{path}:{number}: expected every column once, got {shown(header)}")
        elif len(row) > len(header):
            raise FormatError(
                f"{path}:{number}: expected at most {len(header)} cells, got {len(row)}; quote text with commas"
            )
        else:
            cells = dict(zip(header, row, strict=False))
            yield number, {key: cell for key, cell in cells.items() if cell.strip() or key == "prompt"}


# --- presets ------------------------------------------------------------------------------------------------------


def preset_names() -> tuple[str, ...]:
    """The presets that ship, by name."""
    return tuple(sorted(about.parent.name for about in PRESETS.glob("*/about.json")))


def load_preset(name: str) -> PromptSet:
    """The preset `name`, its probes included. Raises SteerError, naming those there are, for any other name."""
    if name not in preset_names():
        raise SteerError(f"expected a preset among {', '.join(preset_names())}, got {name!r}; see `edge-steer presets`")
    folder = PRESETS / name
    about = json.loads(read_text(folder / "about.json"))
    return PromptSet(
        name=about["name"],
        description=about["description"],
        positive_name=about["positive"],
        negative_name=about["negative"],
        positive=read_prompts(folder / "positive.jsonl"),
        negative=read_prompts(folder / "negative.jsonl"),
        probes=read_probes(folder / "probes.jsonl"),
    )


def neutral_passages() -> tuple[str, ...]:
    """Passages that no preset is about: what a steering changes in them is damage."""
    return tuple(passage.strip() for passage in re.split(r"\n\s*\n", read_text(PRESETS / "neutral.txt").strip()))


# --- chat templates -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatTemplate:
    """How a model wants its chat written. Made by `from_gguf` or `from_tokenizer`.

    source: the Jinja text, or the name of one of llama.cpp's; None for the plain template. bos_token: text of the BOS,
    "" where the model has none.
    """

    source: str | None
    bos_token: str
    _write: Callable[..., str] = field(repr=False, compare=False)

    @classmethod
    def from_gguf(cls, template: str | None, bos_token: str, eos_token: str) -> ChatTemplate:
        """The template in a GGUF's `tokenizer.chat_template`, rendered as llama-cpp-python does; None: the plain one.

        Raises SteerError where the template does not compile.
        """
        if not template:
            return cls(None, bos_token, _plain)
        from edge_steer.chat_format import BoundedChatFormatter

        try:
            formatter = BoundedChatFormatter(template, eos_token, bos_token)
        except _template_errors() as error:
            raise _broken(error) from None

        def write(messages: list[dict[str, Any]], **more: Any) -> str:
            try:
                return str(formatter(messages=messages, **more).prompt)
            except _template_errors() as error:
                if more.get("tools") is not None:
                    raise
                try:  # templates of models that call tools may take a list of them for granted
                    return str(formatter(messages=messages, **{**more, "tools": []}).prompt)
                except _template_errors():
                    raise error from None

        return cls(template, bos_token, write)

    @classmethod
    def builtin(cls, name: str, bos_token: str) -> ChatTemplate:
        """llama.cpp's own template `name`. Raises SteerError that lists them."""
        from edge_steer.chat_format import apply_builtin, builtin_names

        if name not in builtin_names():
            raise SteerError(
                f"expected a chat template's file, or one of {', '.join(builtin_names())}, got {shown(name)}"
            )
        return cls(name, bos_token, lambda messages, **_: apply_builtin(name, messages))

    @classmethod
    def from_tokenizer(cls, hf_tokenizer: Any) -> ChatTemplate:
        """The template of a transformers tokenizer; the plain one where it has none."""
        bos_token, template = hf_tokenizer.bos_token or "", hf_tokenizer.chat_template
        if not template:
            return cls(None, bos_token, _plain)

        def write(messages: list[dict[str, Any]], **_: Any) -> str:
            return str(hf_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

        return cls(str(template), bos_token, write)

    @property
    def is_plain(self) -> bool:
        """Whether the model brought no template."""
        return self.source is None

    def starts_with_bos(self, text: str) -> bool:
        """Whether `text` begins with the BOS already, so that the tokenizer must not add one."""
        return bool(self.bos_token) and text.startswith(self.bos_token)

    def render(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> str:
        """The text of a chat, generation prompt included. Raises SteerError where the template fails.

        A template without a system role (Gemma refuses it, others drop it) gets its text at the head of the first
        user message, a blank line between. A content in parts of text is one text, a line each.
        more: what else a Jinja template may ask for, such as tools.
        """
        chat = [_with_text(message) for message in messages]
        errors = _template_errors()
        system = chat[0]["content"] if chat and chat[0].get("role") == "system" else None
        try:
            text = self._write(chat, **more)
            if system is None or system.strip() in text:
                return text
        except errors as error:
            if system is None:
                raise _broken(error) from None
        try:
            return self._write(_folded(chat), **more)
        except errors as error:
            raise _broken(error) from None

    def prompt_text(self, prompt: Prompt) -> str:
        """The text to record: the rendered prompt, and how the answer begins."""
        return self.render(prompt.messages()) + (prompt.prefix or "")


def _with_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates want it, which write a list as Python does, and None as a word."""
    content = message.get("content")
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, Mapping) else part for part in content]
        if others := [kind for kind in kinds if kind != "text"]:
            raise SteerError(f"expected a message of text, got a part of type {shown(others[0])}; leave it out")
        content = "\n".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str) and message.get("role") in ("system", "user"):
        raise SteerError(f"expected text as content of a {message['role']} message, got {shown(content)}")
    return {**message, "content": content}


def _folded(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`chat` with its system message, the first, moved into the user message after it."""
    system, *rest = chat
    if not rest:
        return [{**system, "role": "user"}]
    return [{**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def _plain(messages: list[dict[str, Any]], **_: Any) -> str:
    """`{prompt}\\nAnswer:`, for a model without a template."""
    text = ""
    for message in messages:
        form = PLAIN_FORMS.get(message["role"])
        if form is None:
            raise ValueError(f"expected role {', '.join(PLAIN_FORMS)}, got {message['role']}")
        text += form.format(message["content"].strip())
    return text


def _template_errors() -> tuple[type[Exception], ...]:
    """What rendering can raise. A template is a program from a file: it can add text to None or divide by 0."""
    from jinja2 import TemplateError

    return (
        TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError,
    )  # fmt: skip


def _broken(error: Exception) -> SteerError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return SteerError(f"expected a chat template that renders, got {reason[:200]}; check the model's chat template")
