"""A page in the browser that samples an ensemble: `paris-jax serve`."""
