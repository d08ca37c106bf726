"""Measure trained models as the paper does: nine tasks, and perplexity on text.

In: an export or a checkpoint. Out: ``results.json`` and a Markdown report next to published numbers. Start
with ``run.py``.
"""
