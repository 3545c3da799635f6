"""tessera.reports."""
