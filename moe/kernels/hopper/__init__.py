"""moe.kernels.hopper."""
