"""The SDK against a server that follows the contract in numpy."""
