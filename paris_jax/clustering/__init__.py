"""The held-out split, and features -> k-means -> clusters."""
