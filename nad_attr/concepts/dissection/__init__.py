"""Measure what units look for, from images with pixel labels."""
