"""Which endpoint: nodes, load, choice, and the pool that connects each."""
