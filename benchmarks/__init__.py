"""Benchmarks: each is one command that prints its table and, with --json, one JSON object on the last line."""
