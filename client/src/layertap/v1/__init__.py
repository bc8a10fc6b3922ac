"""The v1 contract, generated from proto/layertap/v1/encoder.proto by `make proto`."""
