"""Two libraries decide something once, when they are first imported: the server's package, what gRPC's threads
are for; and Triton, without a device, that kernels are interpreted."""

import os

import torch

import layertap_server  # noqa: F401

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# One server over three tiny models, shared by the tests of the server's packages.
pytest_plugins = ("server.fixtures",)
