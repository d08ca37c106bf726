"""Draw figures of the metrics that a run has logged."""
