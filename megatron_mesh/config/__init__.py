"""The settings of a run: their types, where they come from, how they fit together, presets."""
