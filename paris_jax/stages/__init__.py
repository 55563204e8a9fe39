"""One file per command: each reads a run folder, calls the rooms below, and writes a run folder."""
