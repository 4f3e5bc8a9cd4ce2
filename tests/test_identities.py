r"""The identities of information geometry, for every family on a linear model, a small network and no model at all.

.. math:: KL(\theta \| \theta) = 0 \le KL(\theta \| \theta'), \qquad \nabla_q KL(\theta \| q)|_\theta = 0, \qquad E[s] = 0,

.. math:: F = E[s s^T] = \nabla^2_q KL(\theta \| q)|_\theta = -E[\nabla^2 \log p], \qquad
    KL(\theta \| \theta + d) = \tfrac12 d^T F d + O(|d|^3).

The library's side differentiates through the whole model, traced as by `jax.jit` and run in NumPy. The other side consists of
sums over outcomes or quadrature nodes of `oracle`: moments of derivatives of the log-density in the head's raw numbers, pulled
back by the chain rule in NumPy. `test_distributions` compares the log-density itself with SciPy.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import close
from models import BODIES, HEADS, Body, Head, flat_function
from programs.evaluate import evaluated, traced

import jaxfisher as jf

HALVINGS = 0.04 * 0.5 ** np.arange(4)
"""Lengths of the displacements, each half of the one before, whose remainders show the order."""


def directions(size):
    """Six unit vectors."""
    rows = np.random.default_rng(3).standard_normal((6, size))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Point:
    """A model at its parameters: the results of the library and of the oracle, each computed once."""

    head: Head
    body: Body

    def __str__(self):
        return f"{self.head.name}-{self.body.name}"

    @functools.cached_property
    def library(self) -> dict[str, Any]:
        """KL divergences from the point by name of the displacement, and derivatives, over the flat parameters."""
        model, theta = flat_function(self.body.model(self.head), self.body.params(self.head.centre))
        along = directions(theta.size)
        displacements = {"far": 0.7 * along, "near": 1e-7 * along}
        displacements |= {f"step {i}": h * along for i, h in enumerate(HALVINGS)}

        def views(theta, moved, *inputs):
            kl = lambda q: jf.kl(model)(theta, q, *inputs)  # noqa: E731
            zero, gradient = jax.value_and_grad(kl)(theta)
            seen = {"zero": zero, "kl_gradient": gradient, "moved": jax.vmap(kl)(moved)}
            seen["exact"] = jf.exact_fisher(model)(theta, *inputs).as_matrix()
            if self.has_hessian:
                seen["kl_hessian"] = jf.kl_hessian(model)(theta, *inputs).as_matrix()
            return seen

        moved = np.asarray(theta) + np.concatenate(list(displacements.values()))
        seen = evaluated(views, theta, moved, *self.body.inputs)
        ends = np.cumsum([len(rows) for rows in displacements.values()])[:-1]
        return seen | dict(zip(displacements, np.split(seen["moved"], ends), strict=True))

    @property
    def has_hessian(self):
        """Whether to take the Hessian of KL. If KL is a long formula or a quadrature, tracing is slow: only one body does."""
        return self.body.name == "MLP" or self.head.name not in ("Gamma", "Beta", "Dirichlet", "StudentT", "NegativeBinomial")

    @functools.cached_property
    def oracle(self) -> dict[str, Any]:
        """``E[score]``, ``E[score score^T]`` and ``-E[Hessian of log p]`` over the flat parameters; the mass of the nodes."""
        params, axes = self.body.params(self.head.centre), (None, *(0 for _ in self.body.inputs))
        raw, theta = flat_function(self.body.raw, params)

        def derivatives(theta, *x):
            """The raw numbers of an example, their first and their second derivatives."""
            return raw(theta, *x), jax.jacobian(raw)(theta, *x), jax.hessian(raw)(theta, *x)

        # Three examples, even if there are no inputs.
        raws, slopes, bends = evaluated(jax.vmap(derivatives, axes, axis_size=3), theta, *self.body.inputs)
        predicted = evaluated(jax.vmap(self.head.predict), raws)
        rules = [self.head.rule(jax.tree.map(lambda leaf, i=i: leaf[i], predicted)) for i in range(3)]
        nodes, weights = (np.stack(part) for part in zip(*rules, strict=True))
        mass, mean, outer, hessian = map(np.asarray, raw_moments(self.head)(raws, nodes, weights))
        pulled_back = lambda moment: np.mean(slopes.swapaxes(1, 2) @ moment @ slopes, axis=0)  # noqa: E731
        return {
            "mass": mass,
            "mean_score": np.einsum("nk,nkp->p", mean, slopes) / len(mean),
            "outer": pulled_back(outer),
            "hessian": -pulled_back(hessian) - np.einsum("nk,nkpq->pq", mean, bends) / len(mean),
            "slopes": slopes,
        }

    @property
    def unit(self):
        """The size of a score: the root of the largest entry of the Fisher."""
        return np.sqrt(np.max(np.diag(self.oracle["outer"])))


@functools.lru_cache
def raw_moments(head):
    """``(raws [n, k], nodes [n, m, *event], weights [n, m])`` to the mass, ``E[s]``, ``E[s s^T]``, ``E[H]`` of each example.

    The function is traced once for three bodies.
    """
    log_p = jf.log_likelihood(head.predict)

    def of_one(raw, nodes, weights):
        log_density, rows = jax.vmap(jax.value_and_grad(log_p), (None, 0))(raw, nodes)
        mass = weights * jnp.exp(log_density)
        # A node without mass may lie so far out that its score overflows.
        rows = jnp.where(mass[:, None] > 0, rows, 0)
        hessian = jax.hessian(lambda raw: jnp.sum(mass * jax.vmap(log_p, (None, 0))(raw, nodes)))(raw)
        return jnp.sum(mass), mass @ rows, rows.T @ (mass[:, None] * rows), hessian

    return traced(jax.vmap(of_one))


POINTS = [Point(head, body) for head in HEADS for body in BODIES]


# With module scope, pytest runs all tests of one point together, and a worker compiles it once, inside the first test that
# needs it, under the strict promotion of `conftest`.
@pytest.fixture(scope="module", params=POINTS, ids=str)
def point(request):
    return request.param


def test_kl_is_zero_at_zero_displacement_and_never_negative(point):
    assert point.library["zero"] == 0
    assert np.all(point.library["far"] > 0), point.library["far"]
    assert np.all(point.library["near"] >= 0), point.library["near"]


def test_the_gradient_of_kl_is_zero_at_zero_displacement(point):
    gradient = point.library["kl_gradient"] / point.unit
    close(1 + gradient, np.ones_like(gradient), "grad KL, in units of a score", factor=100)


def test_the_expected_score_is_zero(point):
    close(point.oracle["mass"], np.ones(3), "the nodes hold all of the mass")
    mean = point.oracle["mean_score"] / point.unit
    close(1 + mean, np.ones_like(mean), "E[score], in units of a score")


def test_the_exact_fisher_is_the_covariance_of_the_score(point):
    close(point.library["exact"], point.oracle["outer"], "exact_fisher is E[score score^T]")


def test_the_hessian_of_kl_is_the_exact_fisher(point):
    if not point.has_hessian:
        pytest.skip(
            "kl_hessian of this family is made for the MLP alone; the third-order test still holds its KL to the Fisher"
        )
    close(point.library["kl_hessian"], point.library["exact"], "kl_hessian is exact_fisher")
    close(point.library["kl_hessian"], point.oracle["outer"], "kl_hessian is E[score score^T]")


def test_the_exact_fisher_is_minus_the_expected_hessian(point):
    if point.head.name != "Laplace":
        close(point.library["exact"], point.oracle["hessian"], "exact_fisher is -E[Hessian of log p]")
        return
    # The second derivative in the location is a point mass at the kink, which no node sees. In (loc, log scale) the Fisher is
    # diag(1/scale^2, 1), and what the second row of the Jacobian pulls back is all that is left.
    of_scale = point.oracle["slopes"][:, 1]
    close(point.oracle["hessian"], of_scale.T @ of_scale / len(of_scale), "-E[Hessian of log p] is the scale's part")
    lost = point.library["exact"] - point.oracle["hessian"]
    assert np.max(np.abs(lost)) > 0.1 * np.max(point.library["exact"]), "what is lost is not small"


def test_half_the_quadratic_form_is_kl_to_third_order(point):
    along = directions(len(point.oracle["outer"]))
    quadratic = 0.5 * np.einsum("kp,pq,kq->k", along, point.oracle["outer"], along)
    steps = np.stack([point.library[f"step {i}"] for i in range(len(HALVINGS))])
    orders = measured_orders(steps - np.square(HALVINGS)[:, None] * quadratic)
    # No point here is symmetric: the third-order term may nearly vanish along one direction, but not along all.
    assert np.abs(np.median(orders[-1]) - 3) < 0.05, orders
    assert np.all(orders[-1] > 2.5), orders


def measured_orders(remainders):
    """``log2`` of the ratio of each remainder to the next, with a row for each halving."""
    return np.log2(np.abs(remainders[:-1] / remainders[1:]))


# --- symmetry -------------------------------------------------------------------------------------------------------------


def remainder(model, theta, along):
    """KL less half its quadratic form, at each of `HALVINGS`."""

    def left(theta, along):
        half = 0.5 * jf.exact_fisher(model)(theta).quadratic(along)
        return jax.vmap(lambda h: jf.kl(model)(theta, theta + h * along) - h**2 * half)(jnp.asarray(HALVINGS) * 10)

    return evaluated(left, np.asarray(theta), np.asarray(along))


SYMMETRIC = [
    ("a fair coin", lambda theta: jf.Bernoulli(theta[0]), [0.0], [1.0]),
    ("two equal classes", lambda theta: jf.Categorical(theta), [0.4, 0.4], [1.0, -1.0]),
    ("Student's t in its location", lambda theta: jf.StudentT(3.0, theta[0], 1.0), [0.3], [1.0]),
]


@pytest.mark.parametrize(("model", "theta", "along"), [row[1:] for row in SYMMETRIC], ids=[row[0] for row in SYMMETRIC])
def test_symmetry_makes_the_quadratic_form_good_to_fourth_order(model, theta, along):
    """Where KL(theta, theta + d) = KL(theta, theta - d) there are no odd orders."""
    orders = measured_orders(remainder(model, theta, along))
    assert abs(orders[-1] - 4) < 0.05, orders


def test_kl_of_a_normal_is_quadratic_in_its_mean():
    left = remainder(lambda theta: jf.Normal(theta[0], 2.0), [0.3], [1.0])
    # 1/8 is the quadratic form's own size at a displacement of one.
    assert np.all(np.abs(left) <= 8 * np.finfo(float).eps * np.square(10 * HALVINGS) / 8), left


def test_kl_of_a_laplace_is_of_third_order_on_both_sides_of_its_location():
    """``KL = a - 1 + exp(-a)`` with ``a = |d|/scale``: symmetric, but not smooth, so the remainder starts at ``-a^3/6``."""
    left = remainder(lambda theta: jf.Laplace(theta[0], 2.0), [0.3], [1.0])
    a = 10 * HALVINGS / 2
    np.testing.assert_allclose(left, -(a**3) / 6 + a**4 / 24 - a**5 / 120, rtol=1e-3)  # the next term is a^6/720
    assert abs(measured_orders(left)[-1] - 3) < 0.05
