"""Hurt a small run on purpose: the parts of ``tools/fault_test.py``.

In: a number of kills. Out: a table of what was hurt in which phase, and whether anything was lost. Start
with ``kills.py``; ``rank.py`` is what runs inside the victim.
"""
