"""The sampling pipeline of an ensemble."""
