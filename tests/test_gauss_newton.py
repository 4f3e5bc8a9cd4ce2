"""The Gauss-Newton matrix against dense Jacobians and Hessians, closed forms and the exact Fisher."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import assert_close, class_sum_fisher, flat, reference
from programs.evaluate import evaluated, traced

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")


def network(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    w, b = params["out"]
    return hidden @ w + b


def huber(z, y):
    """A smooth loss with a curvature that depends on the residual."""
    return jnp.sum(jnp.sqrt(1 + jnp.square(z - y)))


def coupled(z, y):
    """A loss that couples the outputs."""
    return jnp.square(jnp.sum(z)) + jnp.sum(jnp.logaddexp(0.0, -y * z))


def cross_entropy(z, y):
    return -jax.nn.log_softmax(z)[y]


@functools.cache
def derivatives(loss):
    """The Jacobian of the outputs and the Hessian of the loss in them, of one example: one program for all examples."""

    def of_example(params, x, y):
        flat, unravel = ravel_pytree(params)
        hessian = jax.hessian(lambda z: loss(z, y))(network(params, x))
        return jax.jacobian(lambda flat: network(unravel(flat), x))(flat), hessian

    return traced(of_example)


def dense(params, x, y, loss, weights=None):
    """The Gauss-Newton matrix by its definition, example by example, with `jax.jacobian` and `jax.hessian` in float64."""
    omega = np.full(len(x), 1 / len(x)) if weights is None else np.asarray(weights) / np.sum(weights)
    total = 0
    for w, one, target in zip(omega, np.asarray(x), np.asarray(y), strict=True):
        jacobian, hessian = map(np.asarray, derivatives(loss)(params, one, target))
        total = total + w * jacobian.T @ hessian @ jacobian
    return total


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", [huber, coupled], ids=lambda loss: loss.__name__)
def test_it_is_the_loss_s_hessian_between_jacobians(loss, weighted):
    params, x, _, weights, _ = reference()
    y = np.sin(3.0 * np.asarray(x))
    given = {"weights": weights} if weighted else {}
    expected = dense(params, x, y, loss, weights if weighted else None)
    v = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size, dtype=float)).reshape(leaf.shape), params)
    for batch_size in (None, 3):
        curvature = jf.gauss_newton(network, loss, batch_size=batch_size)
        G = evaluated(lambda *at, curvature=curvature: curvature(*at, **given), params, x, y)
        matrix, product, solution = evaluated(lambda G: (G.as_matrix(), G.mv(v), G.solve(v, 0.1)), G)
        assert_close(matrix, expected, factor=1e3)
        assert_close(flat(product), expected @ flat(v), factor=1e3)
        np.testing.assert_allclose(flat(solution), np.linalg.solve(expected + 0.1 * np.eye(31), flat(v)), rtol=1e-8)
    assert "Gauss-Newton" in repr(G)


def test_of_a_likelihood_in_natural_parameters_it_is_the_fisher():
    params, x, y, _, _ = reference()
    matrix = evaluated(lambda *at: jf.gauss_newton(network, cross_entropy)(*at).as_matrix(), params, x, y)
    assert_close(matrix, class_sum_fisher(params, x), factor=1e4)


def test_outputs_and_targets_may_be_trees():
    model = lambda p, x: {"a": p["w"] * x, "b": [p["w"] ** 2 * x, p["c"]]}  # noqa: E731
    loss = lambda z, y: 0.5 * (z["a"] - y["t"]) ** 2 + 2.0 * z["b"][0] ** 2 + jnp.cosh(z["b"][1]) + 0.0 * y["k"]  # noqa: E731
    params, x = {"w": jnp.float64(0.7), "c": jnp.float64(0.2)}, jnp.array([1.0, -2.0])
    target = {"t": jnp.array([0.3, 0.1]), "k": jnp.array([1, 2])}
    with jax.numpy_dtype_promotion("standard"):
        G = jf.gauss_newton(model, loss)(params, x, target)
    mean = 2.5
    np.testing.assert_allclose(G.as_matrix(), np.diag([np.cosh(0.2), mean + 4 * mean * (2 * 0.7) ** 2]), rtol=1e-12)


def tied(z, y):
    """A curvature with a null direction, and at equal outputs with two equal eigenvalues."""
    return jax.nn.logsumexp(z, axis=0) - z[y]


@pytest.mark.parametrize("equal", [False, True])
def test_it_has_derivatives_where_the_curvature_of_the_loss_is_singular(equal):
    """The curvature of a softmax is singular everywhere, and at equal outputs it has two equal eigenvalues."""
    w = np.zeros((2, 3)) if equal else np.cos(np.arange(6.0)).reshape(2, 3)
    x, y, v = np.array([[1.0, 0.5], [-0.3, 2.0]]), np.array([0, 2]), np.sin(np.arange(6.0)).reshape(2, 3)

    def by_hand(w):
        p, along = jax.nn.softmax(x @ w, axis=1), x @ v
        return jnp.mean(jnp.sum(p * along**2, 1) - jnp.sum(p * along, 1) ** 2)

    found = lambda w: jf.gauss_newton(lambda w, x: x @ w, tied)(w, x, y).quadratic(v)  # noqa: E731
    (value, slope), (expected, expected_slope) = (evaluated(jax.value_and_grad(f), w) for f in (found, by_hand))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(slope, expected_slope, atol=1e-12)


def test_a_step_and_a_view():
    """It can replace a Fisher: a Kronecker view has its trace, and Levenberg and Marquardt's steps lower the loss."""
    params, x, _, _, _ = reference()
    y = np.sin(3.0 * np.asarray(x))
    curvature = jf.gauss_newton(network, huber)
    trace = evaluated(lambda *at: jf.kronecker(curvature(*at)).trace(), params, x, y)
    np.testing.assert_allclose(trace, np.trace(dense(params, x, y, huber)), rtol=1e-10)
    mean = lambda p: jnp.mean(jax.vmap(lambda a, b: huber(network(p, a), b))(x, y))  # noqa: E731
    opt = jf.adapt_damping(jf.natural_gradient(1.0, 1e-2), 1e-2)

    @jax.jit
    def step(params, state):
        updates, state = opt.update(jax.grad(mean)(params), state, params, fisher=curvature(params, x, y), value_fn=mean)
        return jax.tree.map(jnp.add, params, updates), state

    start, state = float(mean(params)), opt.init(params)
    for _ in range(15):
        params, state = step(params, state)
    assert mean(params) - 3 < 0.02 * (start - 3), "three outputs, each of a loss of at least one"


def test_what_is_no_convex_loss_is_not_hidden():
    params, x, _, _, _ = reference()
    G = jf.gauss_newton(network, lambda z, y: -jnp.sum(jnp.square(z - y)))(params, x, jnp.sin(x))
    assert np.all(np.isnan(np.asarray(G.trace())))


def test_what_is_refused():
    params, x, y, _, _ = reference()
    with pytest.raises(ValueError, match="`loss` returned shape"):
        jf.gauss_newton(network, lambda z, y: z - y)(params, x, jnp.sin(x))
    with pytest.raises(TypeError, match="expected real floating outputs"):
        jf.gauss_newton(lambda p, x: jnp.argmax(x), cross_entropy)(params, x, y)
    with pytest.raises(TypeError, match="`loss`"):
        jf.gauss_newton(network, 3.0)
    for outputs in (lambda z: jf.Normal(z, 1.0), lambda z: {"head": jf.Categorical(z)}):
        model = lambda p, x, outputs=outputs: outputs(network(p, x))  # noqa: E731
        with pytest.raises(TypeError, match=r"the model returned a \w+; expected outputs.*jf.exact_fisher\(model\)"):
            jf.gauss_newton(model, lambda d, y: -d.log_prob(y))(params, x, y)
