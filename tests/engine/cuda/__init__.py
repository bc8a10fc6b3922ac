"""Tests of the CUDA paths."""
