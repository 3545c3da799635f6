"""A race on fixed budgets: `python scripts/race/run.py 2e12 --config=lm:tiny`; see docs/leaderboard.md."""
