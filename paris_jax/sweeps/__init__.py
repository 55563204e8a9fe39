"""Sweeps over config fields: a run folder for each point, and one table of their results."""
