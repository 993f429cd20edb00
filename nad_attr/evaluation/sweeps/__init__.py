"""The same measures at many sizes."""
