"""The natural gradient as geometry: steepest descent on a KL ball, Newton in natural parameters, any coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from models import HEADS, INPUTS, compiled, flat_function, linear_raw, mlp_params, mlp_raw

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

EPS = float(np.finfo(float).eps)


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected)


def compiled_at(function, theta, data):
    """``function(theta, *data)`` under `jit`, as numpy arrays."""
    return jax.tree.map(np.asarray, compiled(function)(theta, *data))


# --- the constrained problem -----------------------------------------------------------------------------------------------

X = jnp.asarray(np.random.default_rng(5).standard_normal((8, 2)))
RADII = 1e-2 / 16.0 ** np.arange(4)


def heteroscedastic(theta, x):
    """A normal whose location and log scale are both linear in the input."""
    return jf.Normal(theta[0] + x @ theta[1:3], jnp.exp(theta[3] + x @ theta[4:6]))


def softmax(theta, x):
    """Three classes; the last one's logit is held at zero, so that the Fisher is not singular."""
    free = theta[:2] + x @ theta[2:].reshape(2, 2)
    return jf.Categorical(jnp.append(free, 0.0))


BALLS = [
    ("heteroscedastic normal", heteroscedastic, [0.2, 0.5, -0.4, 0.1, 0.3, -0.2], jnp.linspace(-1.5, 2.0, 8)),
    ("softmax", softmax, [0.2, -0.3, 0.5, 0.4, -0.6, 0.1], jnp.array([0, 1, 2, 0, 2, 2, 1, 0])),
]


@pytest.mark.parametrize(("model", "theta", "y"), [ball[1:] for ball in BALLS], ids=[ball[0] for ball in BALLS])
def test_the_step_that_descends_most_on_a_kl_ball(model, theta, y):
    """SciPy minimises ``g.d`` subject to ``KL(theta, theta + d) <= c`` on the actual divergence.

    As ``c`` goes to zero its answer becomes ``-F^-1 g / lambda`` with ``1/lambda = sqrt(2c / g^T F^-1 g)``, with an error of
    relative size ``sqrt(c)``: the third-order term of KL on a ball of radius ``sqrt(c)``.
    """
    theta = jnp.asarray(theta)
    kl = jax.jit(jax.value_and_grad(lambda q: jf.kl(model)(theta, q, X)))
    gradient, matrix = compiled_at(
        lambda theta, x, y: (
            jax.grad(lambda t: -jnp.mean(jax.vmap(jf.log_likelihood(model), (None, 0, 0))(t, x, y)))(theta),
            jf.exact_fisher(model)(theta, x).as_matrix(),
        ),
        theta,
        (X, y),
    )
    inverse = np.linalg.solve(matrix, gradient)
    slope = gradient @ inverse
    opt = optax.chain(jf.scale_by_fisher(damping=0.0), optax.scale_by_learning_rate(1e6), jf.scale_to_kl(RADII[0]))
    fisher = jf.exact_fisher(model)(theta, X)
    library, _ = jax.jit(opt.update)(jnp.asarray(gradient), opt.init(theta), theta, fisher=fisher)
    errors, multipliers = [], []
    for radius in RADII:
        expected = -np.sqrt(2 * radius / slope) * inverse
        found, pull = constrained_minimum(kl, np.asarray(theta), gradient, radius)
        errors.append(relative(found, expected))
        # At the minimum, g = -lambda grad KL.
        multiplier = -(gradient @ pull) / (pull @ pull)
        assert relative(-multiplier * pull, gradient) < 1e-5, "SciPy found a stationary point"
        multipliers.append(abs(multiplier / np.sqrt(slope / (2 * radius)) - 1))
    # Radii fall by 16, so errors by 4; from the second halving on the next order is below a tenth.
    ratios = np.array(errors[:-1]) / errors[1:]
    np.testing.assert_allclose(ratios[1:], 4, rtol=0.15, err_msg=f"errors {errors}")
    assert errors[-1] < 2e-3
    assert multipliers[-1] < 2e-3
    # The condition number of F is below 1e3.
    assert relative(library, -np.sqrt(2 * RADII[0] / slope) * inverse) < 1e4 * EPS


def constrained_minimum(kl, theta, gradient, radius):
    """The displacement SciPy finds, and the gradient of KL there; both problem and unknowns scaled to order one."""
    unit = np.sqrt(radius)

    def slack(u):
        return 1 - float(kl(theta + unit * u)[0]) / radius

    def slack_gradient(u):
        return -np.asarray(kl(theta + unit * u)[1]) * unit / radius

    direction = gradient / np.linalg.norm(gradient)
    solved = scipy.optimize.minimize(
        lambda u: direction @ u,
        -direction,
        jac=lambda u: direction,
        method="SLSQP",
        constraints={"type": "ineq", "fun": slack, "jac": slack_gradient},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert abs(slack(solved.x)) < 1e-9, "the constraint is active"
    return unit * solved.x, np.asarray(kl(theta + unit * solved.x)[1])


# --- natural parameters -----------------------------------------------------------------------------------------------------


def natural_normal(eta):
    """The normal in its natural parameters: ``log p = eta_0 x + eta_1 x^2 - A(eta)`` with ``eta_1 < 0``."""
    return jf.Normal(-eta[0] / (2 * eta[1]), jnp.sqrt(-0.5 / eta[1]))


def poisson(w, x):
    return jf.Poisson(x @ w)


def bernoulli(w, x):
    return jf.Bernoulli(x @ w)


def categorical(w, x):
    return jf.Categorical(x @ w.reshape(2, 3))


def normal_in_mean_and_scale(theta):
    return jf.Normal(theta[0], theta[1])


NATURAL = [
    ("Poisson log-rate", poisson, [0.3, -0.2], (X, jnp.array([0, 3, 1, 2, 0, 5, 1, 1]))),
    ("Bernoulli logit", bernoulli, [0.3, -0.2], (X, jnp.array([0, 1, 1, 0, 0, 1, 1, 1]))),
    ("Categorical logits, singular", categorical, [0.3, -0.2, 0.1, 0.4, 0.0, -0.3], (X, jnp.array([0, 1, 2, 0, 2, 2, 1, 0]))),
    ("normal, natural parameters", natural_normal, [0.4, -0.7], (jnp.array([0.3, -0.9, 1.4, 0.8]),)),
]


def newton_and_natural(model, theta, data):
    """The Newton step by `numpy` on `jax.hessian` of the loss, minimum norm if singular, and the natural gradient."""
    theta = jnp.asarray(theta)
    log_p = jf.log_likelihood(model)
    exact = lambda theta, *data: jf.exact_fisher(model)(theta, *data[:-1])  # noqa: E731

    def views(theta, *data):
        loss = lambda t: -jnp.mean(jax.vmap(log_p, (None, *(0 for _ in data)))(t, *data))  # noqa: E731
        step = jf.natural_grad(log_p, exact, damping=0.0)(theta, *data)
        observed = jf.observed_information(log_p)(theta, *data).as_matrix()
        return jax.grad(loss)(theta), jax.hessian(loss)(theta), observed, step

    gradient, hessian, observed, step = compiled_at(views, theta, data)
    # Largest condition number here (of the part that is not zero) is below 100; singular values are exact to a few eps.
    newton, _, rank, _ = np.linalg.lstsq(hessian, gradient, rcond=1e-12)
    assert relative(observed, hessian) < 100 * EPS
    return newton, step, rank


@pytest.mark.parametrize(("model", "theta", "data"), [row[1:] for row in NATURAL], ids=[row[0] for row in NATURAL])
def test_in_natural_parameters_the_natural_gradient_is_newtons_step(model, theta, data):
    """``log p`` is linear in the natural parameters but for ``A(eta)``, so its Hessian does not depend on the data."""
    newton, step, rank = newton_and_natural(model, theta, data)
    assert rank == (4 if model is categorical else len(theta))
    assert relative(step, newton) < 1e4 * EPS


def test_in_other_parameters_it_is_not():
    newton, step, _ = newton_and_natural(normal_in_mean_and_scale, [0.1, 1.5], (jnp.array([0.3, -0.9, 1.4, 0.8]),))
    assert relative(step, newton) > 0.1


# --- coordinates ------------------------------------------------------------------------------------------------------------


def test_a_step_is_a_vector_and_the_fisher_a_metric_under_a_change_of_parameters():
    """With ``theta = phi(eta)``: ``F_eta = J^T F_theta J`` and ``J d_eta = d_theta``; a plain gradient goes the other way."""
    (head,) = (head for head in HEADS if head.name == "Normal")
    model, theta = flat_function(lambda params, x: head.predict(mlp_raw(params, x)), mlp_params(head.centre))
    size = theta.size
    rng = np.random.default_rng(7)
    mixing = jnp.asarray(np.eye(size) + 0.3 * rng.standard_normal((size, size)) / np.sqrt(size))

    def phi(eta):
        return mixing @ (eta + eta**3 / 3)

    # The inverse of phi at theta: a cubic with one real root for each number.
    eta = np.array([real_root(value) for value in np.linalg.solve(mixing, theta)])
    np.testing.assert_allclose(phi(jnp.asarray(eta)), theta, rtol=0, atol=100 * EPS * np.max(np.abs(theta)))
    jacobian = np.asarray(mixing) @ np.diag(1 + eta**2)

    x, y = jnp.asarray(rng.standard_normal((24, 2))), jnp.asarray(rng.standard_normal(24))

    def views(params, model, x, y):
        log_p = jf.log_likelihood(model)
        step = jf.natural_grad(log_p, lambda params, x, y: jf.exact_fisher(model)(params, x), damping=0.0)(params, x, y)
        gradient = jax.grad(lambda t: -jnp.mean(jax.vmap(log_p, (None, 0, 0))(t, x, y)))(params)
        return jf.exact_fisher(model)(params, x).as_matrix(), step, gradient

    in_theta = compiled_at(lambda theta, x, y: views(theta, model, x, y), theta, (x, y))
    in_eta = compiled_at(lambda eta, x, y: views(eta, lambda e, x: model(phi(e), x), x, y), jnp.asarray(eta), (x, y))
    condition = np.linalg.cond(in_eta[0])
    assert condition < 1e7, "the Fisher is not singular: there are more rows than parameters"
    assert relative(in_eta[0], jacobian.T @ in_theta[0] @ jacobian) < 1e3 * EPS
    assert relative(jacobian @ in_eta[1], in_theta[1]) < 10 * condition * EPS
    assert relative(in_eta[2], jacobian.T @ in_theta[2]) < 1e3 * EPS
    assert relative(jacobian @ in_eta[2], in_theta[2]) > 0.3, "a plain gradient step depends on the coordinates"


def real_root(value):
    """The real ``e`` with ``e + e^3/3 = value``."""
    roots = np.roots([1 / 3, 0, 1, -value])
    (root,) = roots[np.abs(roots.imag) < 1e-9].real
    return root


def test_a_linear_change_of_inputs_changes_no_prediction():
    """The same on data: with inputs in other units, the step moves the predictions just as far."""
    scale = jnp.array([100.0, 0.01])
    x, counts = INPUTS, jnp.array([1, 0, 4])
    model = lambda params, x: jf.Poisson(linear_raw(params, x)[0])  # noqa: E731
    params = {"weight": jnp.array([[0.3], [-0.2]]), "bias": jnp.array([0.1])}
    rescaled = params | {"weight": params["weight"] / scale[:, None]}

    def moves(params, x, counts):
        log_p = jf.log_likelihood(model)
        step = jf.natural_grad(log_p, lambda params, x, y: jf.exact_fisher(model)(params, x), damping=0.0)(params, x, counts)
        return jax.vmap(linear_raw, (None, 0))(step, x)

    here, there = (compiled_at(moves, p, (inputs, counts)) for p, inputs in ((params, x), (rescaled, x * scale[None])))
    # The condition number of F in the other units is about 1e8.
    assert relative(there, here) < 1e9 * EPS
