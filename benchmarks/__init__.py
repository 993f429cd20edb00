"""Measurements on real data; no part of the library."""
