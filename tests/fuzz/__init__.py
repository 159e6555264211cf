"""Tests every reader of files with hostile files. See `python -m tests.fuzz --help`."""
