"""Sources of clips: one file for each kind."""
