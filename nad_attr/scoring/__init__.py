"""Rivals: other methods that give each channel a number per task."""
