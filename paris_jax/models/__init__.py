"""The spatiotemporal DiT and the router."""
