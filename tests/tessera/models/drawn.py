"""Parameters for tests to which the initial values are nothing: no program is compiled to draw them."""

import jax
import numpy as np


def drawn(model, *inputs):
    """Normal values of a scale at which a small network is far from linear, in the shapes of a module's parameters."""
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"], np.random.default_rng(0)

    def draw(path, leaf):
        return np.float32(0.25 * rng.normal(size=leaf.shape) + (path[-1].key == "gain"))

    return jax.tree.map_with_path(draw, shapes)
