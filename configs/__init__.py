"""One file per experiment, each with `get_config(arg)`; configs import ml_collections only."""
