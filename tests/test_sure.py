"""Distributions with one certain outcome, at infinite fields: everything has its limit, and zero times infinity is no NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfisher as jf

INF = np.inf

# (a distribution of one field, the field at which it is certain, the outcome, other outcomes, an ordinary field)
SURE = {
    "Poisson": (jf.Poisson, -INF, 0, (1, 3, 40), 0.2),
    "NegativeBinomial": (lambda z: jf.NegativeBinomial(z, 0.3), -INF, 0, (1, 3, 40), 0.2),
    "almost a Poisson": (lambda z: jf.NegativeBinomial(z, -40.0), -INF, 0, (1, 40), 0.2),
    "Bernoulli, no": (jf.Bernoulli, -INF, 0, (1,), 0.2),
    "Bernoulli, yes": (jf.Bernoulli, INF, 1, (0,), 0.2),
    "Categorical": (lambda z: jf.Categorical(jnp.stack([jnp.zeros_like(z), z])), -INF, 0, (1,), 0.2),
}


@pytest.mark.parametrize("name", SURE)
def test_a_sure_outcome(name):
    make, at, outcome, others, ordinary = SURE[name]
    sure, ordinary = jnp.float32(at), jnp.float32(ordinary)

    @jax.jit
    def everything(z, other):
        p, q = make(z), make(other)
        places, outcomes = jnp.stack([z, other]), np.array([outcome, *others])
        # Values and slopes for all fields and outcomes, mapped so that the program contains each function once.
        log_prob = jax.vmap(jax.vmap(jax.value_and_grad(lambda z, x: make(z).log_prob(x)), (None, 0)), (0, None))
        from_sure = jax.vmap(jax.value_and_grad(lambda z: p.kl(make(z))))
        return {
            "log_prob": log_prob(places, outcomes),
            "mean": p.mean,
            "draws": p.sample(jax.random.key(0), (5,)),
            "Fisher": p.fisher_matrix(),
            "its slope": jax.grad(lambda z: jnp.trace(make(z).fisher_matrix()))(z),
            "from sure": from_sure(places),
            "of another": q.kl(p),
        }

    seen = jax.tree.map(np.asarray, everything(sure, ordinary))
    values, slopes = seen["log_prob"]
    assert (values[0, 0], slopes[0, 0]) == (0, 0)
    assert np.all(values[0, 1:] == -INF) and np.all(np.isfinite(slopes[0, 1:]))
    assert seen["mean"] == outcome and np.all(seen["draws"] == outcome)
    assert not np.any(seen["Fisher"][..., :1, :1]) and seen["its slope"] == 0
    to, slope_to = seen["from sure"]
    assert (to[0], slope_to[0]) == (0, 0)
    assert seen["of another"] == INF
    # The divergence from a certain distribution is minus the log-probability of its outcome under the other one.
    for found, expected in ((to[1], -values[1, 0]), (slope_to[1], -slopes[1, 0])):
        np.testing.assert_allclose(found, expected, rtol=20 * np.finfo(np.float32).eps)


def test_rows_of_zero_exposure():
    """Counts with exposures of which some are zero: such a row adds nothing to any mean, and makes no NaN."""
    x = jnp.array([[1.0, 0.3], [0.2, -1.0], [0.7, 0.1], [1.2, 0.4]])
    exposure, y = jnp.array([2.0, 0.0, 1.0, 0.0]), jnp.array([3, 0, 1, 0])
    model = lambda b, x, exposure: jf.Poisson(jnp.log(exposure) + x @ b)  # noqa: E731
    log_prob, b = jf.log_likelihood(model), jnp.array([0.4, -0.2])

    @jax.jit
    def everything(x, exposure, y):
        exact = jf.exact_fisher(model)(b, x, exposure)
        return {
            "exact": exact.as_matrix(),
            "empirical": jf.empirical_fisher(log_prob)(b, x, exposure, y).as_matrix(),
            "implicit": jf.implicit_fisher(model)(b, x, exposure).mv(jnp.ones(2)),
            "divergence": jf.kl(model)(b, b + 0.1, x, exposure),
            "step": jf.natural_grad(log_prob, lambda *data: exact, damping=0.1)(b, x, exposure, y),
            "sampled": jf.sampled_fisher(model)(b, jax.random.key(0), x, exposure).trace() * 0,
        }

    whole, part = everything(x, exposure, y), everything(x[::2], exposure[::2], y[::2])
    for name, value in whole.items():
        # Means over four examples, and over the two with an exposure. The step is a solution, which the damping changes.
        if name != "step":
            np.testing.assert_allclose(2 * value, part[name], rtol=1e-12, err_msg=name)
    assert np.all(np.isfinite(whole["step"]))
