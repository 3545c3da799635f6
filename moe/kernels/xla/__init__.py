"""moe.kernels.xla."""
