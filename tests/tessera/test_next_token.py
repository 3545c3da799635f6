"""Next-token loss against NumPy in float64."""

import io

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from tessera.next_token import make_eval, make_loss, results_table


def test_loss_shifts_by_one_and_matches_numpy():
    tokens = np.random.default_rng(0).integers(0, 5, (3, 7), np.int32)
    table = jax.random.normal(jax.random.key(0), (5, 5))
    loss_fn = make_loss(lambda params, tokens: params[tokens], z_loss=0.01)
    loss, metrics = loss_fn(table, {"tokens": jnp.asarray(tokens)}, jax.random.key(1))

    logits = np.asarray(table, np.float64)[tokens[:, :-1]]
    lse = np.log(np.exp(logits).sum(-1))
    nats = (lse - np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]).mean()
    np.testing.assert_allclose(loss, nats + 0.01 * (lse**2).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(-1) == tokens[:, 1:]).mean(), rtol=1e-6)
    found = make_eval(loss_fn)(table, {"tokens": jnp.asarray(tokens)})
    np.testing.assert_allclose(found["loss"], nats, rtol=1e-6)
    assert set(found) == {"loss", "accuracy"}


def test_results_table():
    stream = io.StringIO()
    Console(file=stream, width=80).print(results_table("run", {"test": {"loss": np.log(2), "accuracy": 0.5}}))
    for text in ("run", "test", "0.6931", "1.0000", "0.5000"):
        assert text in stream.getvalue()
