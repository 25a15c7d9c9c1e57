"""Kernels for GPUs, in Triton: loaded only where a CUDA device computes, or by tests of the kernels."""
