"""Statistics of gates against unit concepts."""
