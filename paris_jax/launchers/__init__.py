"""Starts the stages of a run on machines: SLURM, Cloud TPU, GKE and SkyPilot; what every job checks and how it ends."""
