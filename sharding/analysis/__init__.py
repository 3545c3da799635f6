"""sharding.analysis."""
