"""Steerings to share: packs with a card, on a disk or a hub, and the measured set that ships."""
