"""Trained models measured as the paper measures them, through lm-evaluation-harness (lm-eval)."""
