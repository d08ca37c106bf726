"""The code that exports carry: configuration, model and tokenizer for transformers.

In: ``config.json`` and weights. Out: a model for ``AutoModelForCausalLM``. It needs torch and transformers
alone; exports hold copies of these files and of ``recurrence``. Start with ``modeling_mesh.py``.
"""
