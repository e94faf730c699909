"""Attention for training: one function, three paths (plain PyTorch, Triton, Hopper Gluon) and the vendor's kernels."""
