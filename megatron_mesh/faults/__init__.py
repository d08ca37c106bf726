"""Hurting a small run on purpose: the parts of ``tools/fault_test.py``."""
