"""Mosaic GPU kernels for Hopper (wgmma, TMA, persistent, warp-specialized); experimental, not timed."""
