"""The results page: every benchmark writes its own part of it, between two marks."""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).parent.parent / "docs" / "results.md"


def write_part(page: Path, script: str, text: str) -> None:
    """Put `text` where the last text of `script` stands, or at the page's end; the page is made where there is none."""
    begin, end = f"<!-- benchmarks/{script} -->", f"<!-- end of benchmarks/{script} -->"
    old = page.read_text(encoding="utf-8") if page.exists() else "# Results\n"
    before, _, rest = old.partition(begin)
    after = rest.partition(end)[2].strip()
    parts = [before.rstrip(), f"{begin}\n{text.strip()}\n\n{end}", after]
    page.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
