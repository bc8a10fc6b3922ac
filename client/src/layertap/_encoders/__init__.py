"""Served models with the methods of the classes of sentence-transformers."""
