"""Transcoders in other libraries' formats, and theirs as runs of ours; docs/export.md says what is exact.

Each format is a module with one `write_*` function that takes a `Subject` and fills a directory.
"""
