"""Cluster state, routing and plans."""
