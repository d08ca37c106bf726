"""The numbers that a run reports."""
