"""The spatiotemporal DiT and the router, their blocks, positions and attention. Knows nothing of files."""
