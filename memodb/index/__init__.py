"""The vector index of a store: derived data, always rebuildable from the catalog's keys, never the truth."""
