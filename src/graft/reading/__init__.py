"""Data files of every kind, row by row, with faults named by file and line."""
