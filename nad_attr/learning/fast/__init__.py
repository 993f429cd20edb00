"""Frozen networks that cost less time and memory, with the same results."""
