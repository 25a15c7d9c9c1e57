"""Triton kernels for GPUs; imported only with a CUDA device, or by the kernels' tests."""
