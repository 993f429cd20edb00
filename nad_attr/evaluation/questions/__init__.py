"""Where, how and why: mosaics, depth, errors and their explanation."""
