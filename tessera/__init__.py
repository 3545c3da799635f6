"""The shared ground: data, models, optimizers, the step, the loop, checkpoints, logs and reports.

Axis legend: B batch, T time, D model width, H query heads, K key/value heads, h head dimension, F feed-forward width,
V vocabulary, L layers, C classes, S stack of tickets trained together.
"""
