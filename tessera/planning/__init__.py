"""tessera.planning."""
