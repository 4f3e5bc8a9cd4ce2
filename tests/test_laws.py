"""`jf.check_laws` finds faults in a family (for operators, see tests/test_operators.py), and says what it does not accept."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")


def poisson(**members):
    return jf.family(type("Poisson", (jf.Poisson,), members))(jnp.array([0.5, 1.0]))


BROKEN = {
    "said of draws": (
        {
            "mean": property(lambda self: 1.05 * jnp.exp(self.log_rate)),
            "sample": lambda self, key, shape=(): jf.Poisson(self.log_rate).sample(key, shape),
            "variance": property(lambda self: 1.2 * jnp.exp(self.log_rate)),
            "mode": property(lambda self: 5 + jnp.zeros_like(self.log_rate)),
            "entropy": lambda self: 3 * self.log_rate,
        },
        {
            "the mean of draws, std errors",
            "the variance of draws, std errors",
            "E[-log p] = entropy, std errors",
            "log p(mode) less that of draws",
        },
    ),
    "divergence": (
        {"kl": lambda self, other: 1.2 * jf.Poisson.kl(self, other)},
        {
            "E[log p - log q] = KL, std errors",
            "KL / (1/2 t^2 d^T F d) as t -> 0",
            "d^T (Hessian of KL) d / d^T F d",
        },
    ),
    "fisher, and a dtype": (
        {
            "fisher_sqrt_mv": lambda self, u: self._make(2 * jnp.exp(0.5 * self.log_rate) * u.log_rate),
            "mean": property(lambda self: jnp.exp(self.log_rate).astype(jnp.float32)),
        },
        {
            "results of other dtypes",
            "KL / (1/2 t^2 d^T F d) as t -> 0",
            "d^T (Hessian of KL) d / d^T F d",
            "E[(score . d)^2] / d^T F d",
        },
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_laws_see_a_broken_family(name, key):
    members, failed = BROKEN[name]
    laws = jf.check_laws(poisson(**members), key=key)
    assert set(laws.failed) == failed, laws
    assert str(laws).count("FAILED") == len(failed) + 1 and repr(laws).startswith("LawCheck(failed: ")


def test_what_it_does_not_take(key):
    F = jf.scaled_identity(jnp.zeros(3), 2.0)
    with pytest.raises(TypeError, match=r"got a .*function.*pass what it returns"):
        jf.check_laws(jf.dense, key=key)
    with pytest.raises(TypeError, match="`matrix`, `solver` and `rounding` are for operators"):
        jf.check_laws(poisson(), key=key, solver=jf.CG())
    with pytest.raises(ValueError, match=r"batch shape \(\); expected a batch of two or more"):
        jf.check_laws(jf.Poisson(0.0), key=key)
    with pytest.raises(ValueError, match=r"`matrix` has shape \(2, 2\); expected \(3, 3\)"):
        jf.check_laws(F, key=key, matrix=np.eye(2))
