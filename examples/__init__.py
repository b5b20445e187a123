"""Worked examples. They are not installed: run them from a checkout."""
