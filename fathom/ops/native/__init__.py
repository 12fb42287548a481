"""Kernels in C on CPU, one Python file per file of definitions: for a few tokens at a time, for many in tiles, and what lies between products.

Each registers itself as "native" for the arguments it is faster on. The machine's C compiler makes them when they are first
wanted, in some seconds; where there is none, the implementations in plain PyTorch do the work.
"""
