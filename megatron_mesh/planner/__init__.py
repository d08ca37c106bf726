"""A run on paper: memory, traffic, schedule and time of each rank, without GPU, process group or data.

In: a resolved ``Config``. Out: a ``Plan`` as text or picture, and suggestions of rank layouts that fit.
Start with ``plan.py``; ``stages.py`` says what each rank runs.
"""
