"""Where the truth is known, or where nothing is to be found: planted circuits, random weights."""
