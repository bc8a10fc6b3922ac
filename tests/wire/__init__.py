"""What crosses the wire: bytes that others wrote and others read, and how much of them at a time."""
