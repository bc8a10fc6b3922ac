"""Tests of text to token ids."""
