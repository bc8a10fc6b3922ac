"""Native code for the processor."""
