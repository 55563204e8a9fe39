"""Runs training jobs in parallel on the devices of this machine."""
