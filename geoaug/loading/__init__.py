"""From files to batches: sources, order and shards, decoding, and the loaders."""
