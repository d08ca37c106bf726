"""Commands that are run from a clone: one script per job here, and the benchmarks in ``tools.bench``."""
