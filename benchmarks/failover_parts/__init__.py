"""Parts of the failover benchmark: the processes, the load, what is measured."""
