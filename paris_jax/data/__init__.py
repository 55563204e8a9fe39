"""Clips, their latents and text embeddings on disk, and the loader of training batches."""
