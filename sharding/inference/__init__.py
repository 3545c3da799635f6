"""Decoding across devices: what of it knows no model. All functions but the schedules run inside shard_map.

A cache [L, B, K, S, h] lies over pp (layers), the data axes (slots), tp (key/value heads) and cp (positions); a slot is
the place of one text that is being continued. `tessera.serving` joins these functions with a decoder.

Axis legend: L layers, B slots, N rows of a call (one text each), T tokens of a row, S positions a device's cache has
room for, K key/value heads, G query heads per key/value head, H = K G query heads, h head dimension, V vocabulary, C
candidates, I and O inputs and outputs of a kernel, M rows of calibration inputs. Inside shard_map these are the sizes
of one device's part.
"""
