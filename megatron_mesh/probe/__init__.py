"""Looking at runs: figures of what training reported."""
