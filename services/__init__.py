"""One process per folder: thin shells over dspark_core."""
