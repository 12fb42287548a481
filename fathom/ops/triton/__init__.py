"""Kernels for GPUs in Triton, named after the files of definitions; attention takes four.

Each registers itself as "triton" for arguments on a GPU; nothing above `ops` imports from here, and nothing at all does where there is no
GPU or no Triton. Under Triton's interpreter (TRITON_INTERPRET=1) they run on CPU too, where `ops.using("triton")` asks for them: so
tests hold them against the definitions without a GPU.
"""
