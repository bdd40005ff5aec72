"""Checkpoints on disk: the only files of the library that touch others."""
