"""Without a device, kernels in Triton are interpreted; Triton decides that when a kernel is defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
