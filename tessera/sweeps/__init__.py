"""Sweeps over model sizes: the runs, their table, IsoFLOP fits and reports."""
