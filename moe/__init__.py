"""Routed experts: routers, dispatch, expert layers, and the kernels they run on.

    from moe import dispatch, experts, route

Axis legend: B batch, T tokens of a sequence, N tokens (B T flattened), D model width, F feed-forward width of an
expert, E experts, K choices of a token, R rows sorted by expert (at most N K), C places of an expert, G groups of
tokens, P slots of an expert or devices of an axis, L layers. The kernels have their own legend, in moe/kernels.
"""
