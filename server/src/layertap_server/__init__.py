"""The Layertap server."""

import os

# gRPC reads this once, when it is first used. By default each socket's bytes are read on threads that then wake
# the one that takes the calls; without them that one reads for itself, and a call takes a quarter less CPU.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
