"""Control tokens, encoding, shards, the indexed dataset, merge, inspection, packing and loss masks."""
