"""Limits that keep the house easy to live in: a file is read in one sitting, a function at one glance."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted([*(ROOT / "edge_steer").rglob("*.py"), *(ROOT / "converters").rglob("*.py")])
FILE_LINES, FUNCTION_LINES = 250, 40


def functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Name and length of every function: its statements, without signature, docstring and functions inside it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body:
                inside = [
                    each
                    for each in ast.walk(node)
                    if each is not node and isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
                ]
                lines = set(range(body[0].lineno, (node.end_lineno or 0) + 1))
                for each in inside:
                    lines -= set(range(each.lineno, (each.end_lineno or 0) + 1))
                yield node.name, len(lines)


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= FILE_LINES
    assert {name: lines for name, lines in functions(ast.parse(text)) if lines > FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", sorted((ROOT / "native").glob("*.[ch]")), ids=lambda path: path.name)
def test_a_file_of_c_is_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 400
