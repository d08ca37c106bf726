"""Where a run meets the machine: device, processes, failures, stopping, files.

In: the environment of torchrun or srun. Out: process groups, a watchdog, and one clear reason when a run
ends. Start with ``distributed.py`` and ``health.py``; ``device.py`` is the only file that names CUDA.
"""
