"""Controls with a known truth, or with nothing to find: planted circuits, random weights."""
