"""Tests of gRPC's calls on the event loop."""
