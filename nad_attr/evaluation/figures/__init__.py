"""Figures of evaluations; they need matplotlib (the extra ``plot``)."""
