"""The commands: one module each with `SCHEMA`, `ERRORS` and `main`; `tessera.cli.main` runs them by name."""
