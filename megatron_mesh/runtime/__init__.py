"""Where a run meets the machine: devices, processes, output."""
