"""Load on a cluster that runs: requests over its HTTP API, and what became of them."""
