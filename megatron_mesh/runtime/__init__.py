"""What a run needs from the machine: device, processes, their failures, and their output.

A resolved configuration comes in; a device, process groups and places to log to come out. Start reading in
``distributed.py``.
"""
