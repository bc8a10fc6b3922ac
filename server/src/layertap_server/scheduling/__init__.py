"""Turns requests into batches. It imports neither torch nor gRPC."""
