"""The version, in a module of its own so that any other may import it."""

#: The version of this package, as a text.
__version__ = "0.2.0"
