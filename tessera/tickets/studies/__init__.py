"""Experiments on tickets, one module each: `run(config, pieces) -> Study`. `scripts/study.py` picks one by name."""
