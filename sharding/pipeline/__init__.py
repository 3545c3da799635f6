"""sharding.pipeline.run."""
