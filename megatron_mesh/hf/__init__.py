"""Models for Hugging Face transformers, and the way back.

In: a checkpoint of ours, or a directory of transformers. Out: the other one. Start with
``convert/export.py`` and ``convert/import_model.py``; ``modeling`` is the code that exports carry, which
needs torch and transformers alone.
"""
