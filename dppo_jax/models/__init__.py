"""The decoder and where its parameters come from."""
