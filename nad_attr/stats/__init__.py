"""Intervals, tests, p-values and tables of numbers. Nothing here knows a network."""
