"""Plain JAX kernels: loops over live tiles on any platform."""
