"""scaling.fitting."""
