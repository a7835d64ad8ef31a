"""From sources to batches: read, tokenise once, pack, mask."""
