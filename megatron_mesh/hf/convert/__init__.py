"""From a checkpoint to a Hugging Face directory and back, tensor by tensor.

In and out: a checkpoint of ours, and a directory with config.json, safetensors and tokenizer. Start with
``export.py`` and ``import_model.py``; ``tensors.py`` is the contract between their names.
"""
