"""The process and its machine: memory, files, threads, random numbers."""
