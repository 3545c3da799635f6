"""tessera.optim."""
