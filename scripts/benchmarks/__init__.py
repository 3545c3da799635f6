"""scripts.benchmarks."""
