"""The path, timesteps, losses, solvers and guidance: pure functions."""
