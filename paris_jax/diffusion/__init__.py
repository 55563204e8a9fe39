"""Pure functions: the path, times, objectives, solvers and guidance. Knows nothing of files or networks."""
