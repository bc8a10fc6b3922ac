"""Tests of loading a checkpoint."""
