"""Leads a cluster: registers replicas, routes requests and sends plans by the rules of `dspark_core.cluster`."""
