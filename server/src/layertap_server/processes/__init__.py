"""The server as several processes: front processes, an engine process, and the supervisor that starts them."""
