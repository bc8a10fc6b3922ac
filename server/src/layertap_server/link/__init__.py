"""The link between a front process and an engine process: records on a Unix socket, results in shared memory."""
