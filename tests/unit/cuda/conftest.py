"""Triton's kernels without a GPU: its interpreter has to be asked for before they are defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
