"""What joins the four libraries: data, models, optimizers, the training loop, searches, sweeps, serving, reports.

Axis legend: B batch, T time, D model width, H query heads, K key/value heads, h head dimension, F feed-forward width,
V vocabulary, L layers, C classes, S stack of tickets trained together.
"""

__version__ = "0.2.0"
