"""What a run will need and how it will flow, from its settings alone: no GPU, no process group, no data."""
