"""The style of all figures, and the order of tasks in them. Figures stand beside their results."""
