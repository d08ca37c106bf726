"""Runs as SLURM jobs: submitting and watching. What happens inside a job is ``examples/slurm/job.sh``."""
