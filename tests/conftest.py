"""Without a device, kernels in Triton are interpreted. Triton decides that once, when it is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
