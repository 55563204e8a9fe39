"""Files that travel: run folders, manifests, exported networks, and their validation."""
