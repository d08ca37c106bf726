"""What exports ship: the model, its configuration and its tokenizer for transformers."""
