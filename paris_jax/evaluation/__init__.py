"""Scores of generated clips and of velocities, and the report that shows them."""
