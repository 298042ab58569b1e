"""`python -m edge_steer` is `edge-steer`."""

from edge_steer.cli.main import main

main(prog_name="edge-steer")
