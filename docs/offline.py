"""A MkDocs hook: no page loads anything from another host, so the built folder works without a network."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.exceptions import PluginError

_LOADED = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>""")


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """MkDocs calls this for every page, as HTML."""
    if found := _LOADED.search(output):
        raise PluginError(f"{page.file.src_path}: expected nothing of another host, got {found[0]}; keep it in docs/")
    return output
