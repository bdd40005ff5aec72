"""Vectors of differences, their algebra, and merging."""
