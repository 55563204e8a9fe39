"""The training of one network on one mesh."""
