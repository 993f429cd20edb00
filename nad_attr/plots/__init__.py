"""Style of all figures, and the order of tasks in them; a figure is a method of its result."""
