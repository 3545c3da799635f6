"""moe.kernels.tpu.ops."""
