"""One loop for expert, monolith and router: state, step, checkpoints, sharding, metrics."""
