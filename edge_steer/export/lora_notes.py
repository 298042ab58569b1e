"""The texts that go with adapters: how to run them on programs that are not ours."""

from __future__ import annotations

import os
from pathlib import Path

from edge_steer.rotation import cos_sin
from edge_steer.steering import Steering

_ANGLES = (-30, -20, -12, -8, -4, 4, 8, 12, 20, 30, 45, 90, 180)
_EXAMPLE = 8


def scales(degrees: float) -> tuple[float, float]:
    """Scales of the cos and the sin adapter for an angle."""
    c, s = cos_sin(degrees)
    return c - 1, s


# llama-server drops its cache only where a request names other scales than the slot had: server-context.cpp,
# launch_slot_with_task.
def notes(steering: Steering, model: Path, cos: Path, sin: Path) -> str:
    """Markdown: the pair's scales for common angles, and the command lines that use them."""
    c, s = (f"{scale:.7f}" for scale in scales(_EXAMPLE))
    rows = "\n".join("| {} | {:.7f} | {:.7f} |".format(f"{angle:+d}°", *scales(angle)) for angle in _ANGLES)
    return f"""# {steering.name}

Two adapters for `{model.name}` that steer it at any angle, exactly, on unmodified llama.cpp.
Positive angles turn toward *{steering.positive}*, negative ones toward *{steering.negative}*.
They fit this very file and no other quantization of it.

The scales of an angle are cos(angle) − 1 for `{cos.name}` and sin(angle) for `{sin.name}`; always give both.

| angle | cos − 1 | sin |
|---|---|---|
{rows}

## llama-cli, llama-completion

```
llama-cli -m {model.name} --lora-scaled {cos.name}:{c},{sin.name}:{s}
```

That is {_EXAMPLE:+d}°, for every token, the prompt included.

## llama-server

```
llama-server -m {model.name} --lora-scaled {cos.name}:0,{sin.name}:0
```

Then each request names its own angle:

```json
{{"prompt": "How was your day?", "lora": [{{"id": 0, "scale": {c}}}, {{"id": 1, "scale": {s}}}]}}
```

Name both scales in every request, 0 and 0 for no steering. A request without the field is answered at the scales of
the command line, but llama-server may then reuse text that it has cached at another angle; so it may after a
`POST /lora-adapters`. Where it knows `--cache-ram`, add `--cache-ram 0`: the prompts that it keeps in memory do not
tell at which scales. Do not start it with `--lora-init-without-apply`: a request without the field would then run both
adapters at scale 1, which is no angle at all. `edge-steer serve --upstream URL` in front of it minds all of this.
"""


def modelfile(model: Path, adapter: Path) -> str:
    """An Ollama Modelfile for one adapter; `ollama create NAME -f` takes it."""
    try:
        place = Path(os.path.relpath(model.resolve(), adapter.resolve().parent)).as_posix()
    except ValueError:  # on another drive
        place = model.resolve().as_posix()
    source = place if place.startswith(("/", ".")) or ":" in place else f"./{place}"
    return f"FROM {source}\nADAPTER ./{adapter.name}\n"
