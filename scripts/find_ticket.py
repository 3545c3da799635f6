"""Search for lottery tickets. `python scripts/find_ticket.py --help` lists configs and flags."""

from tessera.cli.main import run

if __name__ == "__main__":
    run("find-ticket")
