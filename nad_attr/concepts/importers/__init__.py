"""Unit concepts that other programs have measured."""
