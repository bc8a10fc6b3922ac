"""The Layertap server."""
