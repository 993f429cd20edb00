"""Images with labels of concepts: folder formats, label maps, computed colours."""
