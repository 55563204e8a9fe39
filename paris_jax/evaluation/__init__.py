"""The ensemble against the monolith: protocol, scores and report."""
