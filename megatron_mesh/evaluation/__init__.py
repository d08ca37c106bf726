"""Evaluates trained models as the paper does, with lm-evaluation-harness (lm-eval).

Input is a Hugging Face directory or a checkpoint; output is results.json and results.md. Start reading at
``run.py``: it runs the tasks (``harness.py``) and the perplexity of texts (``text.py``) on one model
(``model.py``).
"""
