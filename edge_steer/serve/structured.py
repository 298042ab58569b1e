"""Answers in JSON: a schema as a grammar, which the sampler keeps to."""

from __future__ import annotations

import json
import re
from typing import Any

from llama_cpp.llama_grammar import JSON_GBNF, json_schema_to_gbnf

from edge_steer.serve.errors import ApiError
from edge_steer.serve.fields import ResponseFormat

MOST_CHARACTERS = 1 << 16  # of a schema
MOST_RULES = 1 << 18  # characters of its grammar: a small schema can ask for a string of a million characters


def format_grammar(wanted: ResponseFormat | None) -> str | None:
    """The grammar of `response_format`; None where any text will do. Raises ApiError if its schema is none."""
    if wanted is None or wanted.type == "text":
        return None
    schema = wanted.json_schema.schema_ if wanted.json_schema else wanted.schema_
    if schema is None and wanted.type == "json_schema":
        raise ApiError(400, "expected json_schema.schema, got none", param="response_format")
    return str(JSON_GBNF) if schema is None else schema_grammar(schema, "response_format")


def schema_grammar(schema: dict[str, Any], param: str, before: str = "", behind: str = "") -> str:
    """GBNF of the JSON that a schema describes, with fixed text around it. Raises ApiError if it cannot be told."""
    text = json.dumps(schema)
    if len(text) > MOST_CHARACTERS or _longest_repetition(schema) > 1000:
        raise ApiError(
            400, f"expected a schema of at most {MOST_CHARACTERS} characters and bounds of at most 1000", param=param
        )
    try:
        rules = str(json_schema_to_gbnf(text))
    except (Exception, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ApiError(
            400, f"expected a JSON schema that a grammar can be made of, got: {reason}", param=param
        ) from None
    if len(rules) > MOST_RULES:
        raise ApiError(400, f"expected a schema with a grammar of at most {MOST_RULES} characters", param=param)
    if not before and not behind:
        return rules
    inner = re.sub(r"^root ::=", "wrapped ::=", rules, flags=re.MULTILINE)
    return f"root ::= {json.dumps(before)} wrapped {json.dumps(behind)}\n{inner}"


def _longest_repetition(schema: Any) -> int:
    """The largest bound that a schema sets on a length; each unit of it becomes a rule."""
    if isinstance(schema, dict):
        bounds = [schema.get(name) for name in ("minLength", "maxLength", "minItems", "maxItems")]
        own = max((each for each in bounds if isinstance(each, int)), default=0)
        return max([own, *map(_longest_repetition, schema.values())])
    return max(map(_longest_repetition, schema), default=0) if isinstance(schema, list) else 0
