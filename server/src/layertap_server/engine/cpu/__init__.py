"""Native code for the CPU, and its Python bindings."""
