"""instructor: its patch over create_chat_completion_openai_v1, as a tool whose arguments llama.cpp's grammar binds.

(Mode.JSON_SCHEMA asks for a response_format json_schema, which llama-cpp-python does not bind by, of no Llama.)
"""

from typing import Any

import instructor
from pydantic import BaseModel, Field
from steered import CHAT, pair, works

from edge_steer import SteeredLlama


class Day(BaseModel):
    reason: str = Field(max_length=60)


models = pair()
sent: dict[str, Any] = {}


def create(**request: Any) -> Any:
    sent.update(request)
    return models.given.create_chat_completion_openai_v1(**request)


ask = instructor.patch(create=create, mode=instructor.Mode.TOOLS)


def through() -> str:
    return str(ask(messages=list(CHAT), response_model=Day, max_tokens=80, temperature=0.0).reason)


def directly(own: SteeredLlama) -> str:
    (call,) = own.create_chat_completion(**sent)["choices"][0]["message"]["tool_calls"]
    return Day.model_validate_json(call["function"]["arguments"]).reason


models.demand_same("as a model of pydantic's", through, directly)
works("instructor")
