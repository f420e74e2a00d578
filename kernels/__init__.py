"""Triton kernels of prumerge_fast, installed as `prumerge_fast.kernels`."""
