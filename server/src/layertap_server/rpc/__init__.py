"""A gRPC server whose handlers run on the asyncio event loop."""
