"""The command line: parses, calls, prints. One file a group of verbs; imports lazily, so that `fathom --help` is instant."""

from fathom.cli.main import main

__all__ = ["main"]
