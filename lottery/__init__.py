"""Lottery tickets: finding, checking and running sparse subnetworks. Masks are pytrees.

Axis legend: S stack of tickets (seeds x arms), N inputs of a layer, M outputs, K surviving weights,
L layers of a stack, U units of a layer (neurons, heads), P points on a path, C eigenvalues.
"""
