"""tessera.sweeps."""
