"""Plan a run from its resolved settings alone: memory, traffic, schedule and checkpoint size.

Nothing here needs a GPU, a process group or data. Start reading at ``report.make_plan``.
"""
