"""The programs of a small run: its schedule, its data, and how its activations move with the width."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scaling.sweeps.plan import Family
from sharding.rules import path_name
from tessera.optim.optimizer import make_schedule
from tessera.sweeps.programs import NEVER, Schedule, Trial, TrialConfig, compile_programs, rate, role_of

LENGTH, VOCAB = 16, 32


def settings(width, layers=2):
    shape = Family(vocab=VOCAB, length=LENGTH, aspect=1e9, least_layers=layers).shape(width)
    return {name: getattr(shape, name) for name in ("layers", "width", "ff", "heads", "head_dim", "vocab", "length")}


def text(size=4000, seed=0):
    """Every token is the one before it plus a little: there is something to learn."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.cumsum(rng.integers(0, 3, size)) % VOCAB, jnp.uint8)


@pytest.mark.parametrize("branch", [600, 800])
def test_a_decay_is_that_of_the_wsd_schedule(branch):
    schedule = Schedule(0.3, 0, branch, 1000)
    theirs = make_schedule("wsd", 0.3, steps=1000, decay=1 - branch / 1000)
    for step in (0, 10, branch - 1, branch, branch + 1, 900, 999):
        assert float(rate(jnp.int32(step), schedule, "linear")) == pytest.approx(float(theirs(step)), rel=1e-5)
        x = max(0.0, (step - branch) / (1000 - branch))
        assert float(rate(jnp.int32(step), schedule, "sqrt")) == pytest.approx(0.3 * (1 - x**0.5), rel=1e-4)


def test_a_trunk_warms_up_and_stays():
    rates = [float(rate(jnp.int32(step), Schedule(0.3, 4), "sqrt")) for step in (0, 1, 2, 3, 4, 10**6)]
    assert rates == pytest.approx([0.075, 0.15, 0.225, 0.3, 0.3, 0.3]) and NEVER > 10**9


@pytest.mark.long
def test_the_base_width_is_trained_as_optax_would():
    config = TrialConfig(base_width=16, clip_norm=1.0, weight_decay=0.1)
    trial, tokens = Trial(settings(16, layers=1), 0, config), text()
    state = jax.jit(trial.init)()
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, 0.9, 0.95, weight_decay=0.1, mask=_matrices))
    params, opt_state, index = state.params, tx.init(state.params), np.arange(24, dtype=np.int32).reshape(3, 8)

    @jax.jit
    def step(params, opt_state, row):
        grads = jax.grad(trial.loss)(params, trial.windows(tokens, row))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for row in index:
        params, opt_state = step(params, opt_state, row)
    ours, _ = jax.jit(trial.advance)(state, tokens, index, np.int32(3), Schedule(1e-2, 0))
    chex.assert_trees_all_close(ours.params, params, rtol=2e-4, atol=1e-6)


def test_a_trunk_and_its_decays_are_one_program():
    trial, tokens = Trial(settings(8, layers=1), 0, TrialConfig()), text()
    advance = jax.jit(chex.assert_max_traces(trial.advance, n=1))
    index, state = np.arange(24, dtype=np.int32).reshape(3, 8), jax.jit(trial.init)()
    trunk, _ = advance(state, tokens, index, np.int32(3), Schedule(1e-2, 2))
    for branch, end, count in ((3, 5, 2), (3, 4, 1)):
        state, _ = advance(trunk, tokens, index, np.int32(count), Schedule(1e-2, 2, branch, end))
        assert int(state.step) == end


def _matrices(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "gain" not in path_name(path), params)


def test_every_leaf_has_a_role():
    params = jax.eval_shape(Trial(settings(16), 0, TrialConfig()).init).params
    roles = {path_name(path): role_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert roles["embed/table"] == "table" and roles["final_norm/gain"] == "readout"
    assert {role for name, role in roles.items() if name.endswith("kernel")} == {"hidden"}
    assert roles["blocks_0/mlp_norm/gain"] == "vector"


def test_windows_hold_the_text_and_one_call_is_many():
    trial, tokens = Trial(settings(8, layers=1), 0, TrialConfig()), text()
    windows = np.asarray(trial.windows(tokens, jnp.array([0, 3])))
    np.testing.assert_array_equal(windows[1], np.asarray(tokens)[3 * LENGTH : 4 * LENGTH + 1])
    programs, index = compile_programs(trial), np.arange(40, dtype=np.int32).reshape(10, 4)
    schedule = Schedule(1e-2, 2)
    whole, _ = programs.advance(programs.init(), tokens, index, np.int32(6), schedule)
    half, _ = programs.advance(programs.init(), tokens, index, np.int32(2), schedule)
    rest, _ = programs.advance(half, tokens, np.roll(index, -2, 0), np.int32(4), schedule)
    assert int(whole.step) == int(rest.step) == 6
    chex.assert_trees_all_equal(whole.params, rest.params)


@pytest.mark.slow
def test_the_noise_estimates_are_unbiased():
    """|G|^2 and the trace of the covariance of single windows' gradients, over the whole of a small set."""
    trial = Trial(settings(8), 0, TrialConfig())
    tokens, size = text(20 * LENGTH + 1), 20
    params = jax.jit(trial.init)().params
    grads = jax.jit(jax.vmap(jax.grad(lambda p, i: trial.loss(p, trial.windows(tokens, i[None]))), (None, 0)))
    rows = np.stack(
        [
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)])
            for g in _each(grads(params, jnp.arange(size)), size)
        ]
    )
    mean, trace = (rows.mean(0) ** 2).sum(), rows.var(0).sum()
    rng = np.random.default_rng(0)
    index = jnp.asarray(rng.integers(0, size, (200, 12, 4)), jnp.int32)
    signal, noise = jax.jit(lambda blocks: jax.lax.map(lambda block: trial.noise(params, tokens, block), blocks))(index)
    found = np.stack([signal, noise], 1)
    error = found.std(0) / len(index) ** 0.5
    assert (np.abs(found.mean(0) - [mean, trace]) < 4 * error).all() and (error < [0.2 * mean, 0.1 * trace]).all()


def _each(tree, size):
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(size)]


# --- the coordinate check of Yang et al. (2022), appendix D.1


def moves(parametrization, width, *, lr, steps=4, seed=0):
    """Root mean square change, over `steps` steps of Adam, of a logit and of a coordinate of the block's output."""
    trial = Trial(settings(width, layers=1), seed, TrialConfig(parametrization=parametrization, base_width=16))
    tokens, index = text(), np.arange(16, dtype=np.int32)[None].repeat(steps, 0)

    def activations(params, inputs):
        keep = {"capture_intermediates": lambda module, _: module.name == "blocks_0", "mutable": ["intermediates"]}
        logits, kept = trial.model.apply({"params": params}, inputs, **keep)
        return logits, kept["intermediates"]["blocks_0"]["__call__"][0][0]

    @jax.jit
    def run(tokens, index):
        state, inputs = trial.init(), trial.windows(tokens, index[0])[:, :-1]
        after, _ = trial.advance(state, tokens, index, steps, Schedule(lr, 0))
        pairs = zip(activations(after.params, inputs), activations(state.params, inputs), strict=True)
        return [jnp.sqrt(jnp.mean((a - b) ** 2)) for a, b in pairs]

    return [float(x) for x in run(tokens, jnp.asarray(index))]


def slopes(parametrization, widths, **options):
    """Exponents of width in the moves."""
    table = np.log([moves(parametrization, width, **options) for width in widths])
    return np.polyfit(np.log(widths), table, 1)[0]


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(16, 64, 256), (16, 32, 64, 128, 256, 512)], ids=["three", "six"])
def test_coordinates_move_alike_at_every_width(widths):
    mup, standard = slopes("mup", widths, lr=3e-3), slopes("standard", widths, lr=3e-3)
    # Of a logit's change the part that does not add up over coordinates falls as width^-1/2, the rest stays.
    assert -0.5 < mup[0] < 0.1 and abs(mup[1]) < 0.25, mup
    # Without the transfer every step moves wider models further.
    assert standard[0] > 0.4 and (standard > mup + 0.2).all(), (standard, mup)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parametrization": "ntk"}, "mup"),
        ({"decay_shape": "cos"}, "sqrt"),
        ({"noise_batches": 1}, "at least 2"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        TrialConfig(**changes)
