"""Requests to batches. No torch and no gRPC."""
