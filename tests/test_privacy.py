"""Clipped sums of gradients, against rows clipped one by one and against Optax's clipping; what one example can change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from problems import assert_close, classifier, data, loop_scores, mlp_params

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

LOG_PROB = jf.log_likelihood(classifier)
N, MAX_NORM = 7, 1.65


@functools.cache
def problem():
    """Parameters, data, the rows of scores, and these rows clipped; some rows are longer than the bound, some are not."""
    params, (x, y) = mlp_params(jax.random.key(7)), data(jax.random.key(8))
    rows = loop_scores(LOG_PROB, params, x, y)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    assert 2 <= np.sum(norms > MAX_NORM) <= 5
    return params, x, y, rows, rows * np.minimum(1, MAX_NORM / norms)


def flat(clipped):
    return np.asarray(ravel_pytree(clipped.sum)[0])


@functools.cache
def program(batch_size):
    return jax.jit(
        lambda params, *data, weights=None: jf.clipped_grad(LOG_PROB, MAX_NORM, batch_size=batch_size)(
            params, *data, weights=weights
        )
    )


@pytest.mark.parametrize("batch_size", [None, 3])
def test_rows_clipped_one_by_one(batch_size):
    params, x, y, rows, clipped = problem()
    found = program(batch_size)(params, x, y)
    assert_close(flat(found), -clipped.sum(0))
    assert int(found.num_clipped) == np.sum(np.linalg.norm(rows, axis=1) > MAX_NORM) and found.sensitivity == MAX_NORM
    # The sum of scores is the gradient of the log-likelihood, not of the loss.
    assert_close(flat(jf.scores(LOG_PROB, batch_size=batch_size)(params, x, y).clipped_sum(MAX_NORM)), clipped.sum(0))


def test_the_clipping_of_optax():
    params, x, y, *_ = problem()
    gradients = jax.vmap(jax.grad(lambda p, x, y: -LOG_PROB(p, x, y)), (None, 0, 0))(params, x, y)
    opt = optax.contrib.differentially_private_aggregate(MAX_NORM, noise_multiplier=0.0, key=jax.random.key(0))
    mean, _ = opt.update(gradients, opt.init(params))
    assert_close(flat(program(None)(params, x, y)) / N, ravel_pytree(mean)[0])


@pytest.mark.parametrize("batch_size", [None, 3])
def test_padding_and_a_batch_of_padding_only(batch_size):
    params, x, y, _, clipped = problem()
    for there in (np.array([1, 0, 1, 1, 0, 0, 1]), np.zeros(N), np.ones(N)):
        rubbish = jnp.where(there[:, None] == 1, x, jnp.nan)
        found = program(batch_size)(params, rubbish, y, weights=jnp.asarray(there, x.dtype))
        expected = there @ -clipped
        np.testing.assert_allclose(flat(found), expected, rtol=0, atol=1e-13)
        assert found.sensitivity == MAX_NORM
        assert int(found.num_clipped) == np.sum((np.linalg.norm(problem()[3], axis=1) > MAX_NORM) & (there == 1))


def test_one_example_changes_the_sum_by_no_more_than_the_sensitivity():
    params, x, y, *_ = problem()
    for i, size in enumerate((1.0, 1e3, 1e-3, 1e8)):
        other = x.at[i].mul(size)
        whole, without = (
            program(None)(params, other, y, weights=weights) for weights in (jnp.ones(N), jnp.ones(N).at[i].set(0.0))
        )
        change = np.linalg.norm(flat(whole) - flat(without))
        assert change <= MAX_NORM * (1 + 100 * np.finfo(float).eps)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15, 1e25, 1e32])
def test_rows_of_any_scale_in_float32(scale):
    """One row of an extreme size among rows near one: each is clipped with its own relative accuracy."""
    x = np.float32([scale, 1.0, 0.5, 0.1])
    log_prob = lambda p, x: jnp.sum(p["w"] @ (x * jnp.ones(3, x.dtype)) + p["b"])  # noqa: E731
    params = {"w": jnp.zeros((2, 3), jnp.float32), "b": jnp.zeros(2, jnp.float32)}
    rows = np.hstack([np.ones((4, 2)), np.repeat(x.astype(float), 6).reshape(4, 6)])
    for max_norm in (1e-3, 2.0, 1e6):
        found = jf.scores(log_prob)(params, x).clipped_sum(max_norm)
        expected = (rows * np.minimum(1, max_norm / np.linalg.norm(rows, axis=1, keepdims=True))).sum(0)
        assert_close(flat(found), expected, factor=20)
        assert int(found.num_clipped) == np.sum(np.linalg.norm(rows, axis=1) > max_norm)


@pytest.mark.compiled
@pytest.mark.parametrize("large", [1e25, 1e30, 1e38])
def test_a_huge_row_keeps_no_other_from_being_clipped(large):
    """The bound holds for each row, and a huge row keeps its direction. A row tiny beside the largest may exceed the bound."""
    x = np.float32([large, 1e-5, 1e-3, 1e-30])
    log_prob = lambda p, x: jnp.sum(p["w"] @ (x * jnp.ones(3, x.dtype)))  # noqa: E731
    params = {"w": jnp.zeros((2, 3), jnp.float32)}
    rows = np.repeat(x.astype(float)[:, None], 6, axis=1)
    for batch_size, max_norm in ((None, 1e-12), (2, 1e-12), (None, 1e-28)):
        expected = rows * np.minimum(1, max_norm / np.linalg.norm(rows, axis=1, keepdims=True))
        found = jf.scores(log_prob, batch_size=batch_size)(params, x).clipped_sum(max_norm)
        assert_close(flat(found), expected.sum(0), factor=20)
        assert int(found.num_clipped) == 3


def test_what_is_not_finite_stays_so():
    params, x, y, *_ = problem()
    assert not np.all(np.isfinite(flat(program(None)(params, x.at[2, 0].set(jnp.nan), y))))


def test_a_weight_that_is_neither_zero_nor_one_gives_nan_where_it_is_not_known():
    params, x, y, *_ = problem()
    assert np.all(np.isnan(flat(program(None)(params, x, y, weights=jnp.full(N, 2.0)))))


def test_bad_input_is_named():
    params, x, y, *_ = problem()
    with pytest.raises(ValueError, match=r"`weights` is 2\.0 at entry 1; expected ones, and zeros for padding"):
        jf.clipped_grad(LOG_PROB, 1.0)(params, x, y, weights=[1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    with pytest.raises(TypeError, match="`weights` at entry 0 is 'a'"):
        jf.clipped_grad(LOG_PROB, 1.0)(params, x, y, weights=["a"] * N)
    with pytest.raises(ValueError, match="`weights` has shape"):
        jf.clipped_grad(LOG_PROB, 1.0)(params, x, y, weights=jnp.ones(3))
    with pytest.raises(ValueError, match=r"`max_norm` is -1\.0; expected a finite number of at least zero"):
        jf.clipped_grad(LOG_PROB, -1.0)
    with pytest.raises(TypeError, match="`max_norm` is 'one'; expected one real number"):
        jf.scores(LOG_PROB)(params, x, y).clipped_sum("one")
    with pytest.raises(TypeError, match="are centred, and the mean"):
        jf.scores(LOG_PROB, center=True)(params, x, y).clipped_sum(1.0)


def test_no_per_example_gradient_is_formed():
    """For a wide network no array of the program is as large as the gradients of all examples."""
    wide = {"w1": jnp.zeros((30, 40)), "w2": jnp.zeros((40, 20))}
    log_prob = jf.log_likelihood(lambda p, x: jf.Categorical(logits=jnp.tanh(x @ p["w1"]) @ p["w2"]))
    x, y = jnp.zeros((16, 30)), jnp.zeros(16, int)

    def largest(function):
        return max(var.aval.size for equation in jax.make_jaxpr(function)(wide, x, y).jaxpr.eqns for var in equation.outvars)

    plain = jax.vmap(jax.grad(log_prob), (None, 0, 0))
    assert largest(plain) == 16 * 30 * 40, "the control: per-example gradients are seen"
    assert largest(jf.clipped_grad(log_prob, 1.0)) <= 30 * 40


def test_a_bound_that_is_known_late_to_be_none_gives_no_number():
    log_prob = jf.log_likelihood(lambda mu, x: jf.Normal(mu * x, 1.0))
    clip = jax.jit(lambda bound: jf.clipped_grad(log_prob, bound)(0.0, jnp.array([1.0, 2.0]), jnp.array([0.5, 3.0])))
    np.testing.assert_allclose(clip(1.0).sum, -1.5, rtol=1e-6)
    for bound in (-1.0, jnp.nan):
        assert np.isnan(clip(bound).sum) and np.isnan(clip(bound).sensitivity)
