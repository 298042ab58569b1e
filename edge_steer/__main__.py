"""`edge-steer` and `python -m edge_steer`."""

from __future__ import annotations

import sys


def run() -> None:
    """The program. Ctrl-C while it is still being imported ends in a line, too."""
    try:
        from edge_steer.cli.main import main
    except KeyboardInterrupt:
        sys.stderr.write("Error: interrupted\n")
        sys.exit(130)
    main(prog_name="edge-steer")


if __name__ == "__main__":
    run()
