"""Errors as OpenAI's clients read them: a status and one JSON object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INVALID = "invalid_request_error"
UPSTREAM = "upstream_error"


def error_body(
    message: str, type: str = INVALID, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, Any]]:
    """The body of an error. param: the field of the request that is wrong; code: a word for programs."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


class ApiError(Exception):
    """An answer that is an error; `body` is what it holds."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        type: str = INVALID,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.type = type
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, dict[str, Any]]:
        return error_body(self.message, self.type, self.param, self.code)
