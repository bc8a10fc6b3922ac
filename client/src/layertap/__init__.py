"""Layertap: what is inside encoder models, over gRPC."""
