"""Tests of requests and replies, most of them over the wire."""
