"""The schema of an experiment, its checks, and the loading of config files; imports nothing heavy."""
