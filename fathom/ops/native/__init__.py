"""Kernels in C for a few tokens at a time on CPU, one Python file per file of definitions; the C lies in kernels.c.

Each registers itself as "native" for the arguments it is faster on: few tokens, no gradients. The machine's C compiler makes them when they are first
wanted, in less than a second; where there is none, the implementations in plain PyTorch do the work.
"""
