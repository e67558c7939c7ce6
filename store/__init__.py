"""The content-addressed store: packs, index, page maps, records. Knows nothing of virtual machines."""
