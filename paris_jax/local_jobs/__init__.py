"""Training jobs side by side on the devices of this machine."""
