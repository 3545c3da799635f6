"""Pruning of trained language models: statistics of their kernels' inputs on text, block by block."""
