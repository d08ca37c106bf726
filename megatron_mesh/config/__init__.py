"""The settings of a run: their types, their sources, how they fit together, and presets.

``schema.py`` lists every setting; start reading there. ``sources.py`` reads YAML files, ``checks.resolve``
fills in and checks the settings, and everything else in the package receives the resolved ``Config``.
"""
