"""Mosaic kernels for TPUs (scalar-prefetched steps); experimental, not timed."""
