"""The settings of a run: their types, where they come from, how they fit together, and presets.

In: YAML files and flags. Out: a ``Config`` in which everything is filled in and checked. Start with
``schema.py``, then ``settings.py`` (sources) and ``resolve`` (checks).
"""
