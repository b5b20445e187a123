"""Proving and choosing: the gate, and what follows it."""
