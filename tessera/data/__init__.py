"""tessera.data."""
