"""Load and benchmark of a running server."""
