"""tessera.lm."""
