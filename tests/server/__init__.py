"""Tests of the server, most of them over the wire."""
