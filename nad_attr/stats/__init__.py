"""Numbers about numbers: intervals, tests, p-values, tables. Nothing here knows a network."""
