"""scaling.sweeps."""
