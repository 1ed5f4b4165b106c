"""One process of the cluster: its state, its threads, the calls it runs."""
