"""The commands of `paris-jax`, one file each."""
