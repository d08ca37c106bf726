"""Checkpoints: what they hold, and how they are saved, verified, found and loaded.

In: a rank's share of weights, optimizer and run state. Out: a directory ``iter_NNNNNNN`` that any rank
layout loads. Start with ``save.py`` and ``load.py``; ``index.py`` says which part of a tensor is where.
"""
