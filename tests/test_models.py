"""Models that people train, against dense float64 results: batch normalisation, frozen parts, gradients of many batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, class_sum_fisher, classifier, flat, loop_scores, reference
from problems import mean_loss as nll

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

# --- batch normalisation in training mode ------------------------------------------------------------------------------------


def statistics(params, x):
    h = x @ params["hidden"]["w"]
    return jnp.mean(h, 0), jnp.var(h, 0)


def normalised(params, x, mean, variance):
    """The classifier with its hidden units normalised, of ONE example."""
    h = (x @ params["hidden"]["w"] - mean) * jax.lax.rsqrt(variance)
    w, b = params["out"]
    return jf.Categorical(logits=jnp.tanh(h + params["hidden"]["b"]) @ w + b)


def batch_logits(params, x, means):
    return jax.vmap(lambda x: normalised(params, x, *means).logits)(x)


def whole(params, x):
    """A batch as ONE example, in training mode."""
    return jf.Categorical(logits=batch_logits(params, x, statistics(params, x)))


def dense(logits, params):
    """``1/n sum J^T M J`` of the logits of a batch, as a function of the parameters."""
    values, jacobian = jax.jit(logits)(params), jax.jit(jax.jacrev(logits))(params)
    total, (n, classes) = 0.0, values.shape
    for i, probs in enumerate(np.asarray(jax.nn.softmax(values))):
        rows = np.stack([flat(jax.tree.map(lambda leaf, i=i, c=c: leaf[i, c], jacobian)) for c in range(classes)])
        total = total + rows.T @ (np.diag(probs) - np.outer(probs, probs)) @ rows / n
    return total


def test_batch_normalisation_by_statistics_as_data_and_by_the_batch_as_one_example():
    """The first recipe neglects only that the statistics depend on the weights; the second is exact.

    What is neglected shows along the scale of each unit's weights, which normalisation undoes: there the exact Fisher is zero.
    """
    params, x, y, *_ = reference()
    means = statistics(params, x)
    each = [jnp.broadcast_to(value, (len(x), *value.shape)) for value in means]
    neglecting, exact = dense(lambda p: batch_logits(p, x, means), params), dense(lambda p: whole(p, x).logits, params)
    assert_close(jf.exact_fisher(normalised)(params, x, *each).as_matrix(), neglecting, factor=1e4)
    made = jf.exact_fisher(whole)(params, x[None], counts=jnp.array([len(x)]))
    assert_close(made.as_matrix(), exact, factor=1e4)
    scale = flat(jax.tree.map(jnp.zeros_like, params) | {"hidden": params["hidden"] | {"b": jnp.zeros(4)}})
    assert abs(scale @ exact @ scale) < 1e-12 * np.trace(exact) and scale @ neglecting @ scale > 0.01 * np.trace(neglecting)

    def loss(params, x, mean, variance, y):
        return -jnp.mean(whole(params, x).log_prob(y))

    opt = jf.natural_gradient(1.0, 0.1)
    step = jf.training_step(normalised, opt, loss=loss)
    new, _, value = jax.jit(step)(params, opt.init(params), x, *each, y)
    gradient = flat(jax.grad(loss)(params, x, *each, y))
    assert_close(value, loss(params, x, *each, y))
    assert_close(flat(new), flat(params) - np.linalg.solve(neglecting + 0.1 * np.eye(31), gradient), factor=1e4)
    step = jf.training_step(whole, opt)
    new, _, value = jax.jit(step)(params, opt.init(params), x[None], y[None], counts=jnp.array([len(x)]))
    assert_close(value, loss(params, x, *each, y))
    assert_close(flat(new), flat(params) - np.linalg.solve(exact + 0.1 * np.eye(31), gradient), factor=1e4)


# --- parts of a model --------------------------------------------------------------------------------------------------------


def test_frozen_parts_are_frozen_by_updates_of_zero_and_not_by_a_mask():
    """The update of the trained part uses its own Fisher; with a mask alone, the rest would get the raw gradient."""
    params, x, y, _, rows = reference()
    labels = {"hidden": "trained", "out": "frozen"}
    natural = jf.natural_gradient(1.0, 0.1)
    frozen = optax.partition({"trained": natural, "frozen": optax.set_to_zero()}, labels)
    masked = optax.masked(natural, {"hidden": True, "out": False})
    dense, hidden = class_sum_fisher(params, x), np.arange(31) < 16
    step = np.linalg.solve(dense[np.ix_(hidden, hidden)] + 0.1 * np.eye(16), rows.mean(0)[hidden])
    for opt, rest in ((frozen, np.zeros(15)), (masked, -rows.mean(0)[~hidden])):
        new, _, _ = jax.jit(jf.training_step(classifier, opt))(params, opt.init(params), x, y)
        assert_close(flat(new) - flat(params), np.concatenate([step, rest]), factor=1e5)

    def of_part(part, x):
        return classifier(params | {"hidden": part}, x)

    part = params["hidden"]
    new, _, _ = jax.jit(jf.training_step(of_part, natural))(part, natural.init(part), x, y)
    assert_close(flat(new) - flat(part), step, factor=1e5)


def test_the_gradient_of_all_micro_batches_and_the_curvature_of_one():
    params, x, y, _, rows = reference()
    batches = x[:6].reshape(2, 3, 3), y[:6].reshape(2, 3)

    def loss(params, first, batches):
        return jnp.mean(jax.lax.map(jax.checkpoint(lambda batch: nll(params, *batch)), batches))

    opt = jf.natural_gradient(1.0, 0.1)
    new, _, _ = jax.jit(jf.training_step(classifier, opt, loss=loss))(params, opt.init(params), x[:3], batches)
    step = np.linalg.solve(class_sum_fisher(params, x[:3]) + 0.1 * np.eye(31), rows[:6].mean(0))
    assert_close(flat(new) - flat(params), step, factor=1e5)


@pytest.mark.relaxed  # optax.MultiSteps adds integers to floats
def test_steps_over_micro_batches_take_the_mean_gradient_and_the_curvature_and_loss_of_the_last():
    params, x, y, _, rows = reference()
    opt = optax.MultiSteps(jf.adapt_damping(jf.natural_gradient(1.0), 0.25), 2, accumulator_dtype=jnp.float64)
    step = jf.training_step(classifier, opt.gradient_transformation())
    state, run = step.init(params, x[:3], y[:3]), jax.jit(step)
    same, state, _ = run(params, state, x[:3], y[:3])
    np.testing.assert_array_equal(flat(same), flat(params))
    new, state, value = run(same, state, x[3:6], y[3:6])
    g, F = -rows[:6].mean(0), class_sum_fisher(params, x[3:6])
    u = -np.linalg.solve(F + 0.25 * np.eye(31), g)
    assert_close(flat(new) - flat(params), u, factor=1e5)
    assert_close(value, nll(params, x[3:6], y[3:6]))
    actual = value - nll(new, x[3:6], y[3:6])
    np.testing.assert_allclose(optax.tree.get(state, "ratio"), actual / -(g @ u + 0.5 * u @ F @ u), rtol=1e-6)


@pytest.mark.relaxed
def test_steps_over_micro_batches_of_a_part_of_the_parameters():
    params, x, y, _, rows = reference()
    steps = optax.MultiSteps(jf.natural_gradient(1.0, 0.25), 2, accumulator_dtype=jnp.float64)
    of_part = optax.GradientTransformationExtraArgs(steps.init, steps.update)
    step = jf.training_step(
        classifier, optax.partition({"on": of_part, "off": optax.set_to_zero()}, {"hidden": "on", "out": "off"})
    )
    state, run, new = step.init(params, x[:3], y[:3]), jax.jit(step), params
    for batch in (slice(3), slice(3, 6)):
        new, state, _ = run(new, state, x[batch], y[batch])
    mine = flat(jax.tree.map_with_path(lambda path, leaf: np.full(leaf.shape, path[0].key == "hidden"), params))
    F = class_sum_fisher(params, x[3:6])[np.ix_(mine, mine)] + 0.25 * np.eye(np.sum(mine))
    assert_close((flat(new) - flat(params))[mine], np.linalg.solve(F, rows[:6].mean(0)[mine]), factor=1e5)
    np.testing.assert_array_equal(flat(new)[~mine], flat(params)[~mine])


@pytest.mark.relaxed  # optax.adam adds integers to floats too
def test_kfac_in_a_partition_trains_its_part_as_if_the_rest_were_data():
    params, x, y, *_ = reference()
    opt = optax.partition({"kfac": jf.kfac(), "adam": optax.adam(0.1)}, {"hidden": "kfac", "out": "adam"})
    adam = optax.adam(0.1)

    def of_part(rest):
        return jf.training_step(lambda part, x: classifier(rest | {"hidden": part}, x), jf.kfac())

    @jax.jit
    def by_hand(params, natural, state):
        hidden, natural, _ = of_part(params)(params["hidden"], natural, x, y)
        updates, state = adam.update(jax.grad(nll)(params, x, y)["out"], state)
        return {"hidden": hidden, "out": optax.apply_updates(params["out"], updates)}, natural, state

    step = jf.training_step(classifier, opt)
    state, run = step.init(params, x, y), jax.jit(step)
    expected = params, of_part(params).init(params["hidden"], x, y), adam.init(params["out"])
    for _ in range(6):
        params, state, _ = run(params, state, x, y)
        expected = by_hand(*expected)
        np.testing.assert_allclose(flat(params), flat(expected[0]), rtol=1e-9, atol=1e-12)
    assert state.inner_states["kfac"].inner_state.accepted


# --- mixed precision ---------------------------------------------------------------------------------------------------------


def mixed(params, x):
    """The classifier with activations in bfloat16 and logits in float32."""
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    return jf.Categorical(logits=classifier(narrow, x.astype(jnp.bfloat16)).logits.astype(jnp.float32))


def test_bfloat16_activations_have_float32_statistics():
    """The Fisher, its factors and the step are float32, and agree with those of wide activations to bfloat16's digits."""
    params, x, y, *_ = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == float else leaf, reference())
    F, wide = (jf.exact_fisher(model)(params, x) for model in (mixed, classifier))
    assert F.as_matrix().dtype == jnp.float32
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    assert_close(F.as_matrix(), wide.as_matrix(), factor=20, eps=eps)
    np.testing.assert_allclose(jf.kronecker(F).trace(), wide.trace(), rtol=20 * eps)
    step = jf.training_step(mixed, jf.kfac())
    state, step, losses = step.init(params, x, y), jax.jit(step), []
    for _ in range(8):
        params, state, loss = step(params, state, x, y)
        losses.append(float(loss))
    assert loss.dtype == jnp.float32 and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert losses[-1] < 0.5 * losses[0]


# --- inputs of any dtype ------------------------------------------------------------------------------------------------------

PRODUCTS = {
    "from the right": lambda x, w: x @ w,
    "from the left": lambda x, w: w.T @ x.T,
    "einsum": lambda x, w: jnp.einsum("...i,io->o...", x, w),
    "sum": lambda x, w: jnp.sum(x[..., None] * w, -2),
    "two layers": lambda x, w: jnp.tanh(0.01 * (x @ w)) @ w[:3],
}
KINDS = [np.bool_, np.uint8, np.int8, np.int32, np.float16, jnp.bfloat16]


def pixels(kind, *shape):
    """Numbers whose squares overflow a small integer dtype; booleans for `np.bool_`."""
    made = np.random.default_rng(0).integers(-120 if kind == np.int8 else 0, 120 if kind == np.int8 else 250, shape)
    return jnp.asarray(made > 100 if kind == np.bool_ else made, kind)


@pytest.mark.relaxed  # JAX's products of matrices take operands of two dtypes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("way", "dtype"), [("from the right", np.float64), *((way, np.float32) for way in PRODUCTS)])
def test_inputs_of_any_dtype_meet_a_weight(way, kind, dtype):
    """Factors from inputs are held in the statistics dtype, since squares of 8-bit pixels would overflow.

    Inputs have one position, and two unless there are two layers.
    """
    rng = np.random.default_rng(1)
    params = {"b": rng.standard_normal(3), "w": rng.standard_normal((6, 3))}

    def model(params, x):
        out = PRODUCTS[way](x, params["w"])
        return jf.Normal(0.01 * out.reshape(3, -1) + params["b"][:, None], jnp.ones((), out.dtype))

    def quantities(params, x, y, batch_size):
        made = jf.scores(log_prob, batch_size=batch_size)(params, x, y)
        fisher = jf.fisher_from_scores(made)
        return {
            "gram": (made.gram(), rows @ rows.T),
            "norms": (made.squared_norms(), np.sum(rows**2, 1)),
            "mv": (made.mv(params), rows @ flat(params)),
            "rmv": (flat(made.rmv(jnp.ones(4, dtype))), np.sum(rows, 0)),
            "diagonal": (flat(made.diagonal()), np.mean(rows**2, 0)),
            "moment": (made.second_moment(), rows.T @ rows / 4),
            "centred": (made.centered().squared_norms(), np.sum((rows - rows.mean(0)) ** 2, 1)),
            "trace": (fisher.trace(), np.sum(rows**2) / 4),
            "Kronecker": (jf.kronecker(fisher).trace(), np.sum(rows**2) / 4),
            "eigenbasis": (jf.eigen_kronecker(fisher).trace(), np.sum(rows**2) / 4),
        }

    log_prob = jf.log_likelihood(model)
    for positions in [()] if way == "two layers" else [(), (2,)]:
        x = pixels(kind, 4, *positions, 6)
        y = rng.standard_normal((4, 3, *(positions or (1,))))
        rows = np.stack(loop_scores(log_prob, jax.tree.map(np.float64, params), x.astype(np.float64), y))
        own = jax.tree.map(dtype, params)
        for name, (found, expected) in quantities(own, x, y.astype(dtype), 3 if positions else None).items():
            np.testing.assert_allclose(found, expected, atol=1e3 * np.finfo(dtype).eps * np.abs(expected).max(), err_msg=name)
