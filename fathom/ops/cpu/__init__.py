"""Implementations for CPUs in plain PyTorch, one file per file of definitions.

Each registers itself as "cpu" for the arguments it is faster on; nothing above `ops` imports from here.
"""
