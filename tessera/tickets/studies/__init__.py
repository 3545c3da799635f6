"""Experiments on tickets, one module each: `run(config, memo) -> Study`. `scripts/study.py` picks one by name."""
