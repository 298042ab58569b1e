"""Steerings made of steerings: `0.3*honest - 0.2*verbose`, `a ~ b`, `a | b`."""

from edge_steer.combining.combination import combine

__all__ = ["combine"]
