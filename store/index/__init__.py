"""The local index: chunk locations as sorted runs in LMDB, and the environment that holds them."""
