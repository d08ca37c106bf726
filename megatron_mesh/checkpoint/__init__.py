"""Checkpoints: what they hold, how they are written, checked, found and loaded."""
