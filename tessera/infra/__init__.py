"""tessera.infra."""
