"""The engines against each other on one model."""
