"""Video files to frames as a player shows them, by worker processes with limits of time and memory."""
