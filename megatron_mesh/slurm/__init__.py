"""Submit a run to SLURM, show its state, requeue, change or cancel it.

``submission`` writes code, settings and batch script to ``RUN/slurm`` and submits them; start reading there.
The job itself is bash: ``job.sh`` is one start of a run and ``task.sh`` one process of it. ``files`` and
``status`` read what the job and the trainer leave behind.
"""
