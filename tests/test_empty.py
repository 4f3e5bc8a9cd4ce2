"""Parameters without entries, such as a layer of no units: every form takes them, and they change no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

PARAMS = {
    "a": jnp.zeros(0),
    "b": jnp.array([0.1, -0.3]),
    "none": jnp.zeros((0, 3)),
    "w": jnp.array([[0.5, 1.0], [-0.2, 0.4], [0.3, 0.1]]),
}
X = jnp.linspace(-1.0, 2.0, 12).reshape(4, 3)


def model(params, x):
    return jf.Normal(jnp.tanh(x @ params["w"] + params["b"]), jnp.ones(2))


@pytest.mark.parametrize(
    "view",
    [
        jf.block_diagonal,
        lambda fisher: jf.block_diagonal(fisher, view=jf.dense),
        lambda fisher: jf.kronecker(fisher, rest=jf.block_diagonal),
    ],
    ids=["a block a leaf", "a matrix a leaf", "Kronecker"],
)
def test_empty_leaves_change_nothing(view):
    v = jax.tree.map(jnp.cos, PARAMS)

    @jax.jit
    def answers(params):
        fisher = view(jf.exact_fisher(model)(params, X))
        return fisher.as_matrix(), fisher.solve(v, 0.1), fisher.logdet(0.1), fisher.rank()

    matrix, x, logdet, rank = jax.tree.map(np.asarray, answers(PARAMS))
    damped = matrix + 0.1 * np.eye(8)
    np.testing.assert_allclose(ravel_pytree(x)[0], np.linalg.solve(damped, ravel_pytree(v)[0]), rtol=1e-11)
    np.testing.assert_allclose(logdet, np.linalg.slogdet(damped)[1], rtol=1e-12)
    assert x["none"].shape == (0, 3) and rank == np.linalg.matrix_rank(matrix)


def test_parameters_of_no_entries_at_all():
    params = {"none": jnp.zeros((0, 3))}
    fisher = jf.exact_fisher(lambda params, x: jf.Normal(x[0], 1.0))(params, X)
    assert jf.solve(fisher, params, 0.1)[0]["none"].shape == (0, 3)
    assert (fisher.trace(), fisher.rank(), fisher.logdet(0.1)) == (0, 0, 0)


def test_a_prior_with_empty_leaves_is_tuned_without_them():
    def tuned(params):
        made = jf.laplace(model, params, X, jnp.zeros((4, 2)), prior=jax.tree.map(jnp.ones_like, params))
        return jf.tune_prior(made, max_steps=3).prior

    found, alone = jax.jit(tuned)(PARAMS), jax.jit(tuned)({name: PARAMS[name] for name in ("b", "w")})
    assert found["none"].shape == (0, 3)
    for name, leaf in alone.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-9)


@pytest.mark.parametrize(
    "make", [lambda like: jf.kfac(like), lambda like: jf.natural_gradient(1.0, 0.1, view=jf.block_diagonal)]
)
def test_a_training_step_with_empty_leaves(make):
    """The step is evaluated abstractly, since empty arrays have no numbers to compare."""
    opt = make(lambda: jf.exact_fisher(model)(PARAMS, X))
    step = jf.training_step(model, opt)
    params, _, loss = jax.eval_shape(lambda: step(PARAMS, opt.init(PARAMS), X, jnp.zeros((4, 2))))
    assert params["none"].shape == (0, 3) and loss.shape == ()


def test_a_model_that_predicts_no_number_is_named():
    """Its scores would have no rows. A slice that was meant to have a length gives one. Products need none, and are zero."""
    nothing = lambda params, x: jf.Normal(x[:0] * params["b"][0], jnp.ones(()))  # noqa: E731
    residual = jf.residuals({"slice": lambda params, x: x[:0] * params["b"][0]})
    for call in (
        lambda: jf.exact_fisher(nothing)(PARAMS, X),
        lambda: residual.gauss_newton(PARAMS, {"slice": X}).trace(),
    ):
        with pytest.raises(ValueError, match="`model` predicts no number for an example"):
            call()
    assert not np.any(ravel_pytree(jf.implicit_fisher(nothing)(PARAMS, X).mv(PARAMS))[0])
