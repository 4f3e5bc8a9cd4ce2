"""Each addition that CONTRIBUTING.md describes, done once with a toy and with public names alone.

A rule of the engine is added inside the package: see tests/test_rules.py. tests/outside has a user's own package of extensions.
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import scipy.stats
from families import Case
from laws import check_family
from models import compiled
from problems import assert_close, classifier, data, flat, mean_loss, mlp_params

import jaxfisher as jf

# --- a distribution ----------------------------------------------------------------------------------------------------------


def exp_excess(x):
    """``e^x - 1 - x``, by its series where the difference would cancel."""
    small = jnp.abs(x) < 0.1
    near, far = jnp.where(small, x, 0), jnp.where(small, 1, x)
    series = jnp.zeros_like(x)
    for k in range(9, 1, -1):
        series = (1 + series) * near / k
    return jnp.where(small, series * near, jnp.expm1(far) - far)


@jf.family
class HalfNormal(jf.Distribution):
    """The absolute value of a normal variable of mean zero and scale ``exp(log_scale)``."""

    log_scale: jax.Array

    field_ndims = (0,)
    event_ndim = 0

    @property
    def mean(self):
        return math.sqrt(2 / math.pi) * jnp.exp(self.log_scale)

    @property
    def variance(self):
        return (1 - 2 / math.pi) * jnp.exp(2 * self.log_scale)

    @property
    def mode(self):
        return jnp.zeros_like(self.log_scale)

    def log_prob(self, x):
        size = jnp.asarray(x).astype(self.log_scale.dtype)
        inside = 0.5 * math.log(2 / math.pi) - self.log_scale - 0.5 * jnp.square(size * jnp.exp(-self.log_scale))
        return jnp.where(size < 0, -jnp.inf, inside)

    def sample(self, key, shape=()):
        size = shape + self.batch_shape
        noise = jax.random.normal(key, size, self.log_scale.dtype)
        return jnp.abs(noise) * jnp.broadcast_to(jnp.exp(self.log_scale), size)

    def kl(self, other):
        return 0.5 * exp_excess(2 * (self.log_scale - other.log_scale))

    def fisher_sqrt_mv(self, u):
        return jax.tree.map(lambda of_field: math.sqrt(2) * of_field, u)


def test_a_distribution(key):
    """A row tests the family against every law: density, divergence, Fisher by three routes, dtypes, draws."""
    rule = lambda: oracle.half_line(0.0, scale=math.exp(0.4))  # noqa: E731
    case = Case("HalfNormal", HalfNormal, (0.4,), (-0.3,), rule, lambda s: scipy.stats.halfnorm(scale=np.exp(s)), outside=(-1,))
    check_family(case, key)


# --- a view, and a transformation --------------------------------------------------------------------------------------------


def softened(fisher: jf.Operator) -> jf.Operator:
    """Half of the Fisher and half of its diagonal."""
    return 0.5 * jf.dense(fisher) + 0.5 * jf.diagonal(fisher)


def scale_by_sharpness() -> optax.GradientTransformationExtraArgs:
    """Divide the updates by the mean eigenvalue."""

    def update(updates, state, params=None, *, fisher=None, **extra_args):
        F = jf.fisher_for(updates, fisher, "scale_by_sharpness")
        return jax.tree.map(lambda leaf: leaf / (F.trace() / F.size), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def test_a_view_and_a_transformation(key):
    """A function from operator to operator is a view; a transformation that takes ``fisher=`` can be chained and masked."""
    params, (x, y) = mlp_params(key), data(key)
    gradient = compiled(jax.grad(mean_loss))(params, x, y)

    @compiled
    def step(params, x):
        F = jf.exact_fisher(classifier)(params, x)
        opt = optax.chain(jf.scale_by_fisher(0.1, view=softened), scale_by_sharpness())
        masked = optax.masked(scale_by_sharpness(), {"hidden": True, "out": False})
        updates, _ = opt.update(gradient, opt.init(params), params, fisher=F)
        return F.as_matrix(), updates, masked.update(gradient, masked.init(params), params, fisher=F)[0]

    dense, updates, masked = step(params, x)
    dense = np.asarray(dense)
    half = 0.5 * dense + 0.5 * np.diag(np.diag(dense))
    expected = np.linalg.solve(half + 0.1 * np.eye(len(dense)), flat(gradient)) / (np.trace(dense) / len(dense))
    assert_close(flat(updates), expected, factor=1e4)
    hidden = flat(gradient["hidden"]) / np.mean(np.diag(dense)[: len(flat(gradient["hidden"]))])
    assert_close(flat(masked["hidden"]), hidden)
    chex.assert_trees_all_equal(masked["out"], gradient["out"])
