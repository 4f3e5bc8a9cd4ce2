"""Distributions that are sure of their outcome, at infinite fields: proper limits, where zero times infinity is no NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfisher as jf

INF = np.inf

# (a distribution of one field, where it is sure, the outcome, others, an ordinary place)
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
        log_prob = jax.value_and_grad(lambda z, x: make(z).log_prob(x))
        to = lambda start: jax.value_and_grad(lambda z: start.kl(make(z)))  # noqa: E731
        return {
            "happens": log_prob(z, outcome),
            "does not": [log_prob(z, x) for x in others],
            "mean": p.mean,
            "draws": p.sample(jax.random.key(0), (5,)),
            "Fisher": p.fisher_matrix(),
            "its slope": jax.grad(lambda z: jnp.trace(make(z).fisher_matrix()))(z),
            "to itself": to(p)(z),
            "to another": to(p)(other),
            "of another": q.kl(p),
            "another's": log_prob(other, outcome),
        }

    seen = jax.tree.map(np.asarray, everything(sure, ordinary))
    assert tuple(seen["happens"]) == (0, 0)
    for value, slope in seen["does not"]:
        assert value == -INF and np.isfinite(slope)
    assert seen["mean"] == outcome and np.all(seen["draws"] == outcome)
    assert not np.any(seen["Fisher"][..., :1, :1]) and seen["its slope"] == 0
    assert tuple(seen["to itself"]) == (0, 0)
    assert seen["of another"] == INF
    # Of a sure outcome the divergence is minus its log-probability under the other.
    np.testing.assert_allclose(seen["to another"], -np.asarray(seen["another's"]), rtol=20 * np.finfo(np.float32).eps)


def test_rows_of_zero_exposure():
    """Counts over times of which some are zero: such a row has nothing to tell, and spoils nothing."""
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
        # Means over four examples and over two; the step is the solution of two such means, but for the damping.
        if name != "step":
            np.testing.assert_allclose(2 * value, part[name], rtol=1e-12, err_msg=name)
    assert np.all(np.isfinite(whole["step"]))
