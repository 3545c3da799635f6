"""Look at the tickets of a finished search. `python scripts/analyze_ticket.py --help` lists configs and flags."""

from tessera.cli.main import run

if __name__ == "__main__":
    run("analyze-ticket")
