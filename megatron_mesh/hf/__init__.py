"""Models for Hugging Face: the code that exports carry, and the way there and back.

``configuration_mesh.py`` and ``modeling_mesh.py`` need torch and transformers only; an export holds copies of
them and of ``recurrence/``.
"""
