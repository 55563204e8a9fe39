"""Clips and their sources, the latent cache, and the loader of training batches."""
