"""The numbers that a run reports, from measuring to figures.

In: what each step measured. Out: lines on the console, ``metrics.jsonl``, TensorBoard, W&B, and pictures.
Start with ``log.py``; ``meters.py`` measures, ``figures.py`` draws.
"""
