"""Tests of the queue, its order and its batches, without torch and gRPC."""
