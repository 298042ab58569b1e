"""Steerings from a pack on the Hugging Face hub: `hub:USER/REPO/NAME`, `hub:USER/REPO@REVISION/NAME`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edge_steer.errors import FormatError, SteerError, quote
from edge_steer.fetch_hub import tell_in_one_line
from edge_steer.sharing.card import CARD, MOST_CARD, NAME, check_file, load_checked, parse_card
from edge_steer.steering import Steering

PREFIX = "hub:"
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ADDRESS = re.compile(rf"hub:({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._-]{{0,95}}))?(?:/({NAME}))?")


@dataclass(frozen=True)
class HubAddress:
    """A steering in a repository on the hub. name: None for the only one. revision: None for the newest."""

    repo: str
    revision: str | None
    name: str | None

    @classmethod
    def parse(cls, written: str) -> HubAddress:
        """Raises SteerError where `written` is not of the form."""
        match = _ADDRESS.fullmatch(written)
        if match is None or ".." in written:
            raise SteerError(f"expected hub:USER/REPO/NAME or hub:USER/REPO@REVISION/NAME, got {quote(written)}")
        return cls(match[1], match[2], match[3])


def fetch_steerings(written: str) -> list[Steering]:
    """The steering at a hub address, fetched into the hub's own cache and held against the pack's card.

    Raises SteerError where it cannot be had, FormatError where it is larger than the card says, or another.
    """
    address = HubAddress.parse(written)
    where = f"{PREFIX}{address.repo}"
    card = parse_card(_fetch(address, CARD, MOST_CARD).read_bytes(), where)
    entry = card.choose(address.name, where)
    file = _fetch(address, entry.file, entry.size)
    check_file(entry, file.read_bytes(), where)
    return load_checked(card, entry, file, where)


def _fetch(address: HubAddress, file: str, most: int) -> Path:
    """The file in the hub's own cache. It is asked for its size before it is fetched."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    where = f"{file} of {address.repo} on the Hugging Face hub"
    with tell_in_one_line(where, "or fetch the pack by hand and give -s PACK.zip/NAME"):
        offline = False
        try:
            size = get_hf_file_metadata(hf_hub_url(address.repo, file, revision=address.revision)).size
        except HfHubHTTPError:
            raise
        except (HTTPError, OSError, RuntimeError):  # no connection: what is in the cache will do
            size, offline = None, True
        if size is None and not offline:
            raise FormatError(f"expected the size of {where}, got none; try again")
        if size is not None and size > most:
            raise FormatError(f"expected at most {most} bytes of {where}, got {size}; ask whoever made the pack")
        path = Path(hf_hub_download(address.repo, file, revision=address.revision, local_files_only=offline))
    if path.stat().st_size > most:
        raise FormatError(f"expected at most {most} bytes of {where}, got {path.stat().st_size}")
    return path
