"""What differs among the libraries of arrays: casts, and statistics in one pass."""
