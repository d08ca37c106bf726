"""Runs as SLURM jobs: submit, watch, change.

In: settings and a site file. Out: a run's directory with code, settings and batch script, and its jobs.
Start with ``submission.py``; ``job.sh`` is what happens inside a job.
"""
