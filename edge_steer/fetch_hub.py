"""Models on the Hugging Face hub, fetched by its own client into its own cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_steer.errors import SteerError
from edge_steer.fetch_wheels import sha256_of
from edge_steer.registry import Entry, HubFile, own_place


@contextmanager
def tell_in_one_line(where: str, by_hand: str) -> Iterator[None]:
    """The hub client's errors as SteerErrors. where: what is fetched, from where. by_hand: what else one can do."""
    # The transport's error: httpx's or requests', as the release of huggingface_hub has it.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        EntryNotFoundError,
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise SteerError(
            f"expected {where}, got a gated repository; accept the licence on the model's page and run `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise SteerError(f"expected {where}, got no connection; connect to the internet, {by_hand}") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise SteerError(
            f"expected {where}, got not found; it has moved or is private: run `hf auth login`, {by_hand}"
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SteerError(f"expected {where}, got {reason}; try again, {by_hand}") from error


def download(wanted: Entry, source: HubFile) -> Path:
    """The model's file in the hub's own cache, checked. Raises SteerError if it cannot be had or is another."""
    from huggingface_hub import hf_hub_download

    by_hand = f"or put the file at {own_place(wanted)}"
    where = f"{source.file} from {source.repo} on the Hugging Face hub"
    with tell_in_one_line(where, by_hand):
        path = Path(hf_hub_download(source.repo, source.file, revision=source.revision))
    size = path.stat().st_size
    if wanted.size not in (None, size):
        raise SteerError(f"expected {wanted.size} bytes of {where}, got {size}; the repository has changed, {by_hand}")
    if wanted.sha256 is not None and (found := sha256_of(path)) != wanted.sha256:
        # Left in the hub's cache, it would pass for the model next time.
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise SteerError(f"expected sha256 {wanted.sha256} of {where}, got {found}; fetch again, {by_hand}")
    return path
