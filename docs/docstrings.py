"""A griffe extension: this project's docstrings, as Markdown.

They name a parameter or field at the beginning of a line (`mask: (S,) bool, steered or not`), go on indented, and have
other lines around them. Markdown would run such lines together; here each becomes an item of a list.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_NAMED = re.compile(r"([a-z_*.]\w*(?:, [a-z_]\w*)*): +(\S.*)")


def as_markdown(text: str) -> str:
    """`text` with every line `name: meaning`, and what is indented below it, as an item of a list."""
    lines: list[str] = []
    in_item = False
    before = ""
    for line in text.splitlines():
        begins = in_item or not before or before.endswith((".", ":"))  # not in the middle of a sentence
        named = _NAMED.fullmatch(line) if begins else None
        before = line.strip()
        if named:
            names = ", ".join(f"`{name}`" for name in named[1].split(", "))
            lines += ([] if in_item or not lines else [""]) + [f"- {names}: {named[2]}"]
            in_item = True
        elif in_item and line.strip() and line[0].isspace():
            lines.append(f"    {line.strip()}")
        elif in_item and line.strip() and not line.startswith(("Raises", "Returns")) and line[0].islower():
            lines.append(f"    {line}")  # a meaning that goes on without indent
        else:
            lines += [""] if in_item and line.strip() else []
            lines.append(line)
            in_item = False
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is collected."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
