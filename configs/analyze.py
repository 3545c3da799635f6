"""What the tickets of a finished search are like: connectivity, overlap over seeds, sharpness.

What: every ticket is trained a second time in another order of the data, and the error on the line between the two ends
is drawn; masks of different seeds are compared with chance; top Hessian eigenvalue and SAM sharpness of every network.
`analysis.curve_steps` adds a Bezier curve between the ends (nonlinear mode connectivity). `search` is the workdir of
`scripts/find_ticket.py`; `levels` are those to look at, () for five over the depth.
Cost: 100 seconds of one core for five levels of eight of `configs/lottery_digits.py` at 400 iterations.
Expected: not measured.
Command: python scripts/analyze_ticket.py --config=configs/analyze.py --config.search=runs/digits
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The analysis of one search."""
    config = ConfigDict()
    return config
