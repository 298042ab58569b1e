"""Expressions over steerings: `0.3*honest - 0.2*verbose`, `a ~ b` (a with b projected out), `a | b` (a along b).

The grammar is a part of Python's own, so Python's parser reads it; nothing is evaluated by Python. `~` and `|` bind as
`*` does, from the left: they are given to the parser as two operators of that precedence which are not used here.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edge_steer.combining.turn import Turn
from edge_steer.errors import SteerError, quote

_LONGEST = 400
_AS_PYTHON = str.maketrans({"~": "@", "|": "%"})
_NOT_OURS = "@%#"
_EXAMPLE = "write it as 0.3*honest - 0.2*verbose, a ~ b or a | b"
_NUMBERS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


@dataclass(frozen=True)
class Expression:
    """A checked expression: its text, its tree, and the names that stand in it, in order."""

    text: str
    tree: ast.expr
    names: tuple[str, ...]


def parse(text: str) -> Expression:
    """The expression that `text` writes. Raises SteerError, with the column, where it writes none."""
    text = " ".join(text.split())
    if not text or len(text) > _LONGEST:
        raise SteerError(f"expected an expression of 1 to {_LONGEST} characters, got {len(text)}; {_EXAMPLE}")
    for sign in _NOT_OURS:
        if sign in text:
            raise _refusal(text, text.index(sign), f"no {sign}")
    try:
        tree = ast.parse(text.translate(_AS_PYTHON), mode="eval").body
    except SyntaxError as error:
        # Python counts from 1; where the text ends too early, it may give 0.
        raise _refusal(text, (error.offset or len(text) + 1) - 1, "a steering, a number or a sign") from None
    except (ValueError, RecursionError, MemoryError):  # a null character; brackets nested too deeply
        raise SteerError(f"expected an expression, got {quote(text)}; {_EXAMPLE}") from None
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.expr)]
    for node in nodes:
        _check(text, node)
    names = dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name))
    if not names:
        raise SteerError(f"expected an expression that names a steering, got {quote(text)}; {_EXAMPLE}")
    return Expression(text, tree, tuple(names))


def _check(text: str, node: ast.expr) -> None:
    match node:
        case ast.Name() | ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            return
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.MatMult() | ast.Mod()):
            return
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            if abs(number) < 1e6:
                return
    raise _refusal(text, node.col_offset, "a name, a number below a million, + - * / ~ | or brackets")


def _refusal(text: str, column: int, expected: str) -> SteerError:
    column = min(max(column, 0), len(text))
    got = quote(text[column:], 20) if text[column:] else "its end"
    return SteerError(f"expected {expected} at column {column + 1} of the expression, got {got}; {_EXAMPLE}")


def evaluate(expression: Expression, named: Mapping[str, Turn]) -> Turn:
    """What the expression makes of the turns that its names stand for. Raises SteerError where it adds a number to a
    steering, multiplies two steerings, or projects with a number."""
    found = _evaluate(expression.tree, named)
    if isinstance(found, Turn):
        return found
    raise SteerError(f"expected an expression of steerings, got a number; {_EXAMPLE}")


def _evaluate(node: ast.expr, named: Mapping[str, Turn]) -> Turn | float:
    match node:
        case ast.Name(id=name):
            return named[name]
        case ast.Constant(value=value):
            return float(value)  # type: ignore[arg-type]  # `_check` has seen that it is a number
        case ast.UnaryOp(op=op, operand=operand):
            sign = -1.0 if isinstance(op, ast.USub) else 1.0
            one = _evaluate(operand, named)
            return one.scale(sign) if isinstance(one, Turn) else sign * one
        case ast.BinOp(left=left, op=op, right=right):
            return _apply(op, _evaluate(left, named), _evaluate(right, named))
    raise AssertionError(node)  # `_check` refuses it


def _apply(op: ast.operator, one: Turn | float, other: Turn | float) -> Turn | float:
    match op, one, other:
        case ast.Add(), Turn(), Turn():
            return one.plus(other)
        case ast.Sub(), Turn(), Turn():
            return one.plus(other.scale(-1.0))
        case ast.MatMult(), Turn(), Turn():
            return one.without(other)
        case ast.Mod(), Turn(), Turn():
            return one.along(other)
        case ast.Mult(), Turn(), float():
            return one.scale(other)
        case ast.Mult(), float(), Turn():
            return other.scale(one)
        case ast.Div(), Turn(), float() if other:
            return one.scale(1 / other)
        case _, float(), float() if type(op) in _NUMBERS and not (isinstance(op, ast.Div) and other == 0):
            number = _NUMBERS[type(op)](one, other)
            if math.isfinite(number):
                return number
    sign = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.MatMult: "~", ast.Mod: "|"}[type(op)]
    kinds = ["a number" if isinstance(each, float) else "a steering" for each in (one, other)]
    zero = " of 0" if other == 0 else ""
    raise SteerError(f"expected no {kinds[0]} {sign} {kinds[1]}{zero} in an expression; {_EXAMPLE}, with brackets")
