"""Parts of the failover benchmark: the processes, the load and the measurements."""
