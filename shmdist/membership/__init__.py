"""Joining the cluster, connecting its processes, leaving it."""
