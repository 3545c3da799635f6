"""A lottery-ticket search on a network and a training loop of your own (Frankle & Carbin 2019).

Train, prune the smallest weights, set the survivors back to their first values, train again. If what is left trains
as well as the whole network, while the same mask with new weights does not, it is a winning ticket.
The search asks for two functions: one that draws weights, one that trains a stack of masked networks.

Run: python examples/ticket_search.py (about 15 seconds of processor time; scikit-learn for the handwritten digits)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from lottery import imp, summary, transform

images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
order = jax.random.permutation(jax.random.key(0), len(images))
train, test = order[:1000], order[1000:]


class Net(nn.Module):
    """One hidden layer."""

    @nn.compact
    def __call__(self, x):
        """Images [..., 64] to logits [..., 10]."""
        x = nn.relu(nn.Dense(64, name="hidden")(x))
        return nn.Dense(10, name="output")(x)


net = Net()


def loss(params, batch):
    """Mean cross-entropy of the images with these numbers."""
    logits = net.apply(params, images[batch])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()


def train_one(args):
    """Train one masked network for 200 steps of Adam; return its weights and its test accuracy."""
    params, mask, seed = args
    optimizer = transform.sparse(optax.adam(3e-3), mask)  # pruned weights stay exactly zero

    def step(state, key):
        params, moments = state
        batch = jax.random.choice(key, train, (64,))
        updates, moments = optimizer.update(jax.grad(loss)(params, batch), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    keys = jax.random.split(jax.random.key(seed), 200)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return params, (net.apply(params, images[test]).argmax(-1) == labels[test]).mean()


@jax.jit
def train_stack(params, masks, seeds):
    """Train all networks of a level one after the other: on a CPU faster than `jax.vmap`, which suits a GPU."""
    return jax.lax.map(train_one, (params, masks, seeds))


def train_fn(starts, *, level):
    """What the search calls once a level."""
    params, accuracy = train_stack(starts.params, starts.masks, starts.seeds)
    return imp.Trained(params, rows=[{"accuracy": float(a)} for a in accuracy])


config = imp.SearchConfig(
    seeds=(0, 1, 2, 3),
    levels=3,
    rate=0.7,  # of the surviving weights, before each level
    output="output",  # the output layer loses half as many
    arms=("ticket", "reinit"),
)
rows = imp.search(lambda key: net.init(key, images[:1]), train_fn, imp.Memory(), config)

print("weights left   network       test accuracy (mean of 4 seeds, 95% interval)")
for row in summary.summarize(rows, "accuracy"):
    print(f"{row['density']:11.1%}   {row['arm']:11s}   {row['mean']:.3f} ± {row['half_width']:.3f}")

last = summary.differences(rows, "accuracy", "ticket", "reinit")[-1]
print(f"at {last['density']:.1%} the ticket is ahead of new weights by {last['mean']:.3f} ± {last['half_width']:.3f}")
assert last["mean"] - last["half_width"] > 0

mask, weights = rows.ticket(seed=0, level=3)  # take it home: a mask and the weights to train
assert all(jax.tree.leaves(jax.tree.map(lambda w, m: bool((w[~m] == 0).all()), weights, mask)))
