"""tessera.tickets."""
