"""Serving a trained decoder: parameters under a plan, prefill and decode, continuous batching, HTTP.

Axes are those of `sharding.inference`.
"""
