"""sharding.multihost."""
