"""Starts the stages of a run on machines: SLURM, Cloud TPU, GKE and SkyPilot; the checks of every job and its end."""
