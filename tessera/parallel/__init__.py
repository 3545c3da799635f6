"""tessera.parallel."""
