"""Kernels in C on CPU, one Python file per file of definitions, for a few tokens at a time and, of hyper-connections, in training.

Each registers itself as "native" for the arguments it is faster on. The machine's C compiler makes them when they are first
wanted, in a second; where there is none, the implementations in plain PyTorch do the work.
"""
