"""Leads a cluster: serves registration, routing and plans by the rules of `dspark_core.cluster`."""
