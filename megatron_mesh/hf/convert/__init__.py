"""From checkpoints to Hugging Face directories and back."""
