"""Names that people try and that do not exist: the code that the error suggests runs, and other errors are unchanged."""

import copy
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfisher as jf
from jaxfisher import _absent


def model(w, x):
    return jf.Normal(x @ w, 1.0)


def things():
    """The names that occur in the suggestions."""
    x, y, params, key = jnp.array([[2.0, 0.0], [2.0, 2.0]]), jnp.ones(2), jnp.zeros(2), jax.random.key(0)
    log_prob = jf.log_likelihood(model)
    loss = lambda mean, y: (mean - y) ** 2 / 2  # noqa: E731
    F, S, d = jf.exact_fisher(model)(params, x), jf.scores(log_prob)(params, x, y), jf.Normal(0.0, 2.0)
    vectors, given = {"v": jnp.ones(2), "w": jnp.ones(2), "vectors": jnp.eye(2), "damping": 0.1}, {"p": d, "q": d, "other": d}
    rest = {"moved": params + 1, "loc": 0.0, "scale": 1.0, "key": key, "jf": jf, "jnp": jnp, "jax": jax, "optax": optax}
    data = {"model": model, "predict": lambda w, x: x @ w, "log_prob": log_prob, "loss": loss, "params": params, "x": x, "y": y}
    return {"F": F, "S": S, "d": d, "np": np, **vectors, **given, **rest, **data}


OWNERS = {"F": _absent.OF_OPERATOR, "S": _absent.OF_SCORES, "d": _absent.OF_DISTRIBUTION, "jf": _absent.OF_PACKAGE}
CODE = {code for names in OWNERS.values() for text in names.values() for code in re.findall("`(.*?)`", text)}


@pytest.mark.parametrize("owner", OWNERS)
def test_the_error_of_an_absent_name_says_what_to_write(owner):
    value = things()[owner]
    for name, instead in OWNERS[owner].items():
        assert not hasattr(value, name)
        with pytest.raises(AttributeError, match=f"has no `{name}`. {re.escape(instead)}"):
            getattr(value, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing_like_it'"):
        value.nothing_like_it  # noqa: B018


@pytest.mark.parametrize("code", sorted(CODE))
def test_what_is_to_be_written_runs(code):
    if code == "d.covariance":
        assert jf.MultivariateNormal(jnp.zeros(2), jnp.eye(2)).covariance.shape == (2, 2)
    elif code == "jf.laplace(model, params, x, y, prior=1.0)":
        assert isinstance(jf.laplace(model, jnp.ones(2), *map(things().get, "xy"), prior=1.0), jf.Posterior)
    else:
        eval(code, things())


def test_an_error_inside_a_property_is_the_one_that_is_raised():
    @jf.family
    class Odd(jf.Distribution):
        rate: jax.Array
        field_ndims, event_ndim = (0,), 0

        @property
        def mean(self):
            return jnp.nothing_like_it(self.rate)

        @property
        def cdf(self):
            return self.rate.nothing_like_it

    with pytest.raises(AttributeError, match=r"'jax[.]numpy' has no attribute"):
        Odd(1.0).mean  # noqa: B018
    with pytest.raises(AttributeError, match=r"Array.*nothing_like_it"):
        Odd(1.0).cdf  # noqa: B018


@pytest.mark.parametrize("name", ["F", "S", "d"])
def test_what_is_copied_pickled_and_flattened_is_as_before(name):
    value = things()[name]
    for other in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value)), jax.tree.map(jnp.asarray, value)):
        assert type(other) is type(value) and jax.tree.all(jax.tree.map(jnp.array_equal, other, value))


def test_arithmetic_of_operators():
    F = things()["F"]  # of the rows (2, 0) and (2, 2): [[4, 2], [2, 2]]
    np.testing.assert_array_equal(sum([F, F, F]).as_matrix(), [[12, 6], [6, 6]])
    for two in (2, np.float32(2), jnp.float32(2)):
        np.testing.assert_array_equal((F / two).as_matrix(), [[2, 1], [1, 1]])
    assert np.all(np.isnan((F / jnp.float32(0)).as_matrix())), "a run-time number that is none to divide by"
    for divisor, error in ((0, ValueError), (-1.0, ValueError), (1j, TypeError), (jnp.ones(2), TypeError)):
        with pytest.raises(error, match="`c` in `F / c`"):
            F / divisor
    for other in (F, 1.0, np.eye(2)):
        with pytest.raises(TypeError, match=r"a difference may have negative eigenvalues.*`F @ v - G @ v`"):
            F - other
    for other in (1, 0.0, np.eye(2)):
        with pytest.raises(TypeError, match="cannot add a Fisher"):
            F + other


def test_scores_are_a_matrix_to_numpy():
    S = things()["S"]
    assert np.asarray(S).dtype == np.float64 and np.asarray(S, dtype=np.float32).dtype == np.float32
    np.testing.assert_array_equal(np.asarray(S), S.as_matrix())
    np.testing.assert_array_equal(S @ jnp.array([1.0, 3.0]), [2, 8])  # residual one times the rows
