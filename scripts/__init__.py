"""Thin mains: each turns a config into calls."""
