"""``python -m nad_attr.cli`` is ``nad-attr``."""

from nad_attr.cli import main

if __name__ == "__main__":
    main()
