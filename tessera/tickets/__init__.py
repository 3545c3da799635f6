"""Ticket searches: from a config to trained tickets, probes and reports; `studies/` holds the experiments."""
