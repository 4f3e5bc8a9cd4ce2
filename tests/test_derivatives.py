"""Derivatives of information by parameters, data and damping: forward and in reverse, in every form, at equal eigenvalues."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from programs.evaluate import evaluated, traced

import jaxfisher as jf

PARAMS = {"v": np.linspace(-0.4, 0.5, 6).reshape(3, 2), "w": np.cos(np.arange(6.0)).reshape(3, 2)}


def mean(params, x):
    return jnp.tanh(x @ params["w"]) + jnp.sin(x @ params["v"])


def model(params, x):
    return jf.Normal(mean(params, x), jnp.ones(2))


def exact(params, x):
    return jf.exact_fisher(model)(params, x)


def dense(params, x):
    """The Fisher by its definition, ``1/n sum_i J_i^T J_i``."""
    flat, unravel = ravel_pytree(params)
    jacobian = jax.vmap(jax.jacfwd(lambda flat, x: mean(unravel(flat), x)), (None, 0))(flat, x)
    return jnp.einsum("nor,nos->rs", jacobian, jacobian) / len(x)


def kronecker(params, x):
    """The Kronecker blocks of both leaves by hand, each with the trace of its block."""
    slopes = jnp.cos(x @ params["v"]), 1 - jnp.square(jnp.tanh(x @ params["w"]))
    made = [jnp.kron(x.T @ x / len(x), jnp.diag(jnp.mean(jnp.square(slope), 0))) for slope in slopes]
    traces = [jnp.mean(jnp.sum(jnp.square(x), 1) * jnp.sum(jnp.square(slope), 1)) for slope in slopes]
    return jax.scipy.linalg.block_diag(*(trace / jnp.trace(block) * block for trace, block in zip(traces, made, strict=True)))


def eigen_kronecker(params, x):
    """The eigen-Kronecker view by hand: the eigenbasis of the factors, with the second moments along it."""
    basis = jnp.linalg.eigh(x.T @ x / len(x))[1]
    slopes = jnp.cos(x @ params["v"]), 1 - jnp.square(jnp.tanh(x @ params["w"]))
    values = [jnp.square(x @ basis).T @ jnp.square(slope) / len(x) for slope in slopes]
    made = [jnp.einsum("ak,ko,bk,oq->aobq", basis, value, basis, jnp.eye(2)).reshape(6, 6) for value in values]
    return jax.scipy.linalg.block_diag(*made)


def blocks(params, x):
    """The Fisher without the blocks between different leaves."""
    return dense(params, x) * jnp.kron(jnp.eye(2), jnp.ones((6, 6)))


def truncated(params, x):
    """The four largest eigenpairs of the Fisher."""
    values, vectors = jnp.linalg.eigh(dense(params, x))
    return vectors[:, -4:] @ jnp.diag(values[-4:]) @ vectors[:, -4:].T


def sketched(params, x):
    """Four eigenpairs, less the largest eigenvalue that was left out."""
    values, vectors = jnp.linalg.eigh(dense(params, x))
    return vectors[:, -4:] @ jnp.diag(values[-4:] - values[-5]) @ vectors[:, -4:].T


FORMS = {
    "scores": (exact, dense),
    "scores, in pieces": (lambda p, x: jf.exact_fisher(model, batch_size=2)(p, x), dense),
    "dense": (lambda p, x: jf.dense(exact(p, x)), dense),
    "diagonal": (lambda p, x: jf.diagonal(exact(p, x)), lambda p, x: jnp.diag(jnp.diag(dense(p, x)))),
    "blocks": (lambda p, x: jf.block_diagonal(exact(p, x)), blocks),
    "kronecker": (lambda p, x: jf.kronecker(exact(p, x)), kronecker),
    "eigen-Kronecker": (lambda p, x: jf.eigen_kronecker(exact(p, x)), eigen_kronecker),
    "implicit": (lambda p, x: jf.implicit_fisher(model)(p, x), dense),
    "low rank": (lambda p, x: jf.low_rank(exact(p, x), 6), dense),
    "low rank, some": (lambda p, x: jf.low_rank(exact(p, x), 4), truncated),
    "sketch": (lambda p, x: jf.sketch(exact(p, x), 4), sketched),
    "low rank of dense": (lambda p, x: jf.low_rank(jf.dense(exact(p, x)), 6), dense),
    "a prior": (lambda p, x: exact(p, x) + jf.scaled_identity(p, 0.1), lambda p, x: dense(p, x) + 0.1 * jnp.eye(12)),
    "sum of forms": (
        lambda p, x: exact(p, x) + jf.diagonal(exact(p, x)),
        lambda p, x: dense(p, x) + jnp.diag(jnp.diag(dense(p, x))),
    ),
}
U, C = jnp.asarray(np.cos(np.arange(12.0))), jnp.asarray(np.sin(np.arange(12.0)))
DIRECTION = jax.tree.map(lambda leaf: np.sin(1 + np.arange(leaf.size, dtype=float)).reshape(leaf.shape), PARAMS)
COTANGENT = np.array([0.3, -1.0, 0.7, 0.5, 1.3])


def numbers(make, params, x, damping):
    """Log-determinant, trace, diagonal, quadratic and solve, as five numbers."""
    F = make(params, x)
    u = F.spec.unravel(U)
    diagonal, solution = (ravel_pytree(tree)[0] for tree in (F.diagonal(), F.solve(u, damping)))
    return jnp.stack([F.logdet(damping), F.trace(), C @ diagonal, F.quadratic(u), C @ solution])


def expected(make, params, x, damping):
    """The same numbers of the dense matrix, by JAX alone."""
    matrix = make(params, x)
    damped = matrix + damping * jnp.eye(12)
    solution = jnp.linalg.solve(damped, U)
    return jnp.stack([jnp.linalg.slogdet(damped)[1], jnp.trace(matrix), C @ jnp.diag(matrix), U @ matrix @ U, C @ solution])


@functools.cache
def both_ways(function, make):
    """The numbers, their derivative in one direction, and the gradient of one combination of them.

    Forms of one matrix share the program of the dense one.
    """

    def run(params, x, damping):
        along = (DIRECTION, jnp.cos(jnp.arange(x.size, dtype=float)).reshape(x.shape), jnp.ones(()))
        value, forward = jax.jvp(functools.partial(function, make), (params, x, damping), along)
        back = jax.grad(lambda *args: COTANGENT[: value.size] @ function(make, *args), (0, 1, 2))(params, x, damping)
        return value, forward, ravel_pytree(back)[0]

    return traced(run)


ORTHONORMAL = np.concatenate([np.eye(3), -np.eye(3), np.zeros((1, 3))])
"""Inputs with which many eigenvalues are equal, and many zero, at parameters of zero."""


CASES = [
    ("scores", 3),
    ("scores", 7),
    ("scores, in pieces", 7),
    ("dense", 7),
    ("diagonal", 7),
    ("blocks", 3),
    ("kronecker", 3),
    ("eigen-Kronecker", 7),
    ("implicit", 7),
    ("low rank", 3),
    ("low rank, some", 3),
    ("sketch", 3),
    ("low rank of dense", 3),
    ("a prior", 3),
    ("sum of forms", 3),
]
"""Each form with fewer rows than parameters (6 of 12), or more (14): every case is two programs."""


APART = {"low rank, some", "sketch", "eigen-Kronecker"}
"""Views made of eigenvectors: the eigenvalues of those that are used must differ from those of the others."""


@pytest.mark.parametrize(("form", "rows"), CASES)
def test_derivatives_against_a_dense_matrix(form, rows):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)))
    cases = {"apart": (PARAMS, x[:rows], 0.3), "equal": (jax.tree.map(jnp.zeros_like, PARAMS), ORTHONORMAL[:rows], 0.3)}
    if form in APART:
        del cases["equal"]
    for name, case in cases.items():
        found, true = (both_ways(f, make)(*case) for f, make in zip((numbers, expected), FORMS[form], strict=True))
        for one, other in zip(found, true, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9 * np.max(np.abs(other)), err_msg=name)


@pytest.mark.parametrize("rows", [3, 7])
def test_derivatives_of_a_path_of_dampings(rows):
    """The solutions of a path are computed together, and their derivatives are those of single solves."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)))[:rows]
    shares = jnp.array([1.0, 20.0])

    def path(params, x, damping):
        F = exact(params, x)
        return jax.vmap(lambda x: ravel_pytree(x)[0])(jf.solve_path(F, params, damping * shares)[0]).reshape(-1)

    def one_by_one(params, x, damping):
        matrix, v = dense(params, x), ravel_pytree(params)[0]
        return jnp.concatenate([jnp.linalg.solve(matrix + damping * share * jnp.eye(12), v) for share in shares])

    along = PARAMS, jnp.cos(x), jnp.ones(())
    weights = jnp.cos(jnp.arange(24.0))

    def both_of(f):
        return lambda *args: (jax.jvp(f, args, along), jax.grad(lambda *args: weights @ f(*args), (0, 1, 2))(*args))

    found, true = (evaluated(both_of(f), PARAMS, x, 0.3) for f in (path, one_by_one))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(true), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9 * np.max(np.abs(other)))


POWERS = (-0.5, 0.5, -1.0, 1.5)


def powers(make, params, x, damping):
    """Powers along a vector, for these exponents."""
    F = make(params, x)
    u = F.spec.unravel(U)
    return jnp.stack([C @ ravel_pytree(F.power_mv(u, power, damping))[0] for power in POWERS])


def expected_powers(make, params, x, damping):
    """The same from the root of the dense matrix, by the iteration of Denman and Beavers, without any eigenvalue."""
    damped = make(params, x) + damping * jnp.eye(12)
    root, inverse = damped, jnp.eye(12)
    for _ in range(12):
        root, inverse = 0.5 * (root + jnp.linalg.inv(inverse)), 0.5 * (inverse + jnp.linalg.inv(root))
    return jnp.stack([C @ m @ U for m in (inverse, root, jnp.linalg.inv(damped), damped @ root)])


@pytest.mark.parametrize(("form", "rows"), CASES)
def test_derivatives_of_powers_against_a_dense_matrix(form, rows):
    """Also where eigenvalues are equal: all those that are zero, if there are fewer rows than parameters."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)))[:rows]
    cases = {"apart": (PARAMS, x, 0.3), "few": (PARAMS, x[:1], 0.3), "twice": (PARAMS, jnp.tile(x[:1], (rows, 1)), 0.3)}
    if form not in APART:
        cases["equal"] = jax.tree.map(jnp.zeros_like, PARAMS), jnp.asarray(ORTHONORMAL[:rows]), 0.3
    if form in APART or form.startswith("low rank"):
        cases = {"apart": cases["apart"]}
    for name, case in cases.items():
        found, true = (both_ways(f, make)(*case) for f, make in zip((powers, expected_powers), FORMS[form], strict=True))
        for one, other in zip(found, true, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-8 * np.max(np.abs(other)), err_msg=name)


@functools.cache
def second_order(function, make):
    """The derivative, in one direction, of the gradient of one combination of the numbers."""

    def run(params, x, damping):
        along = (DIRECTION, jnp.cos(jnp.arange(x.size, dtype=float)).reshape(x.shape), jnp.ones(()))
        gradient = jax.grad(lambda *args: jnp.dot(COTANGENT[:4], function(make, *args)), (0, 1, 2))
        return ravel_pytree(jax.jvp(gradient, (params, x, damping), along)[1])[0]

    return traced(run)


@pytest.mark.parametrize(("form", "rows"), [("scores", 3), ("dense", 7), ("a prior", 3), ("kronecker", 3)])
def test_second_derivatives_of_powers_against_a_dense_matrix(form, rows):
    """Where eigenvalues are equal (NaN for factors), nearly equal, or zero because there are fewer rows than parameters."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)))[:rows]
    still = jax.tree.map(jnp.zeros_like, PARAMS)
    cases = {
        "apart": (PARAMS, x, 0.3),
        "equal": (still, jnp.asarray(ORTHONORMAL[:rows]), 0.3),
        "nearly equal": (still, jnp.asarray(ORTHONORMAL[:rows] * (1 + 1e-5 * np.arange(3.0))), 0.3),
        "twice": (PARAMS, jnp.tile(x[:1], (rows, 1)), 0.3),
    }
    if form == "kronecker":
        del cases["nearly equal"]
    for name, case in cases.items():
        found, true = (second_order(f, make)(*case) for f, make in zip((powers, expected_powers), FORMS[form], strict=True))
        if form == "kronecker" and name == "equal":
            assert np.all(np.isnan(found) | np.isclose(found, true))
            continue
        np.testing.assert_allclose(found, true, rtol=1e-7, atol=1e-8 * np.max(np.abs(true)), err_msg=name)


def sums(make, params, x, damping):
    """Four sums over eigenvalues."""
    F = make(params, x)
    values = F.eigvalsh()
    return jnp.stack(
        [jf.effective_dimension(F, damping), jnp.sum(jnp.log(values + damping)), F.logdet(damping), jnp.sum(values)]
    )


def expected_sums(make, params, x, damping):
    matrix = make(params, x)
    damped = matrix + damping * jnp.eye(12)
    logarithm = jnp.linalg.slogdet(damped)[1]
    return jnp.stack([jnp.sum(matrix * jnp.linalg.inv(damped)), logarithm, logarithm, jnp.trace(matrix)])


@pytest.mark.parametrize("rows", [3, 7])
def test_second_derivatives_of_sums_over_eigenvalues(rows):
    """Right also at eigenvalues that are zero by a loss of rank; NaN where others are equal."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)))[:rows]
    cases = {"apart": (PARAMS, x, 0.3), "twice": (PARAMS, jnp.tile(x[:1], (rows, 1)), 0.3)}
    cases["equal"] = jax.tree.map(jnp.zeros_like, PARAMS), jnp.asarray(ORTHONORMAL[:rows]), 0.3
    for name, case in cases.items():
        found, true = (second_order(f, make)(*case) for f, make in zip((sums, expected_sums), FORMS["scores"], strict=True))
        if name == "equal":
            assert np.all(np.isnan(found) | np.isclose(found, true))
        else:
            np.testing.assert_allclose(found, true, rtol=1e-7, atol=1e-8 * np.max(np.abs(true)), err_msg=name)


def counts(make, params, x, damping):
    """A sum of the trace of the inverse, which is the derivative of the log-determinant, and the effective dimension."""
    F = make(params, x)
    return 0.9 * jax.grad(F.logdet)(damping) - 0.6 * jf.effective_dimension(F, damping)


@functools.cache
def slopes(function, make):
    """The number and its gradient. Forms that are one matrix share the program of the dense one."""
    return traced(jax.value_and_grad(functools.partial(function, make), (0, 1, 2)))


def expected_counts(make, params, x, damping):
    """The same number for the dense matrix, from ``tr (F + d I)^-1`` and ``tr F (F + d I)^-1``."""
    matrix = make(params, x)
    inverse = jnp.linalg.inv(matrix + damping * jnp.eye(12))
    return 0.9 * jnp.trace(inverse) - 0.6 * jnp.sum(matrix * inverse)


@pytest.mark.parametrize("form", FORMS)
def test_the_trace_of_the_inverse_and_the_effective_dimension(form):
    """Derivatives by parameters, data and damping, also at equal or zero eigenvalues (except for forms that pick some)."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)))
    cases = {"apart": (PARAMS, x, 0.3), "equal": (jax.tree.map(jnp.zeros_like, PARAMS), ORTHONORMAL[:3], 0.3)}
    if form in APART:
        del cases["equal"]
    programs = [slopes(f, make) for f, make in zip((counts, expected_counts), FORMS[form], strict=True)]
    for name, case in cases.items():
        found, true = (ravel_pytree(program(*case))[0] for program in programs)
        np.testing.assert_allclose(found, true, rtol=1e-7, atol=1e-9 * np.max(np.abs(true)), err_msg=name)


def gated(params, x):
    """A mean of which one part is multiplied by a gate."""
    return jnp.tanh(x @ params["w"]) + params["gate"] * jnp.sin(x @ params["v"])


NORMS = {
    "scores": (lambda F: F, np.ones((13, 13)), 0.0),
    "diagonal": (jf.diagonal, np.eye(13), 0.0),
    "blocks": (jf.block_diagonal, np.kron(np.eye(3), np.ones((6, 6)))[5:, 5:], 0.0),
    "a prior": (lambda F: jf.block_diagonal(F) + jf.scaled_identity(F, 0.1), np.kron(np.eye(3), np.ones((6, 6)))[5:, 5:], 0.1),
}
"""Views with the entries that they keep, and the prior that is added."""


@pytest.mark.parametrize("view", NORMS)
def test_parameters_without_information_leave_the_norm_its_derivative(view):
    """A closed gate leaves a block of zeros, whose norm has no derivative of its own."""
    make, kept, prior = NORMS[view]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))
    model = lambda params, x: jf.Normal(gated(params, x), jnp.ones(2))  # noqa: E731
    params = lambda t: {"gate": t, "v": PARAMS["v"], "w": (1 + t) * PARAMS["w"]}  # noqa: E731

    def found(t):
        return make(jf.exact_fisher(model)(params(t), x)).frobenius_norm()

    def expected(t):
        flat, unravel = ravel_pytree(params(t))
        jacobian = jax.vmap(jax.jacfwd(lambda flat, x: gated(unravel(flat), x)), (None, 0))(flat, x)
        matrix = kept * jnp.einsum("nor,nos->rs", jacobian, jacobian) / len(x) + prior * jnp.eye(13)
        return jnp.sqrt(jnp.sum(jnp.square(matrix)))

    for one, other in zip(*(evaluated(jax.value_and_grad(f), 0.0) for f in (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)


def kept_pairs(matrix, rank, less=False):
    """The matrix of the largest eigenpairs, less the largest eigenvalue that is left out, in NumPy."""
    values, vectors = np.linalg.eigh(matrix)
    left = values[-rank - 1] if less and rank < len(values) else 0.0
    return (vectors[:, -rank:] * (values[-rank:] - left)) @ vectors[:, -rank:].T


def of_rows(x):
    """The empirical Fisher with these scores."""
    return jf.empirical_fisher(jnp.dot)(jnp.zeros(6), x)


def mean_square(x):
    return x.T @ x / len(x)


APART_BY = {"equal": np.diag([3.0, 3, 2, 1, 0.5, 0])[:5], "near": np.diag([1, 1 + 1e-4, 1 + 3e-4, 3, 5, 0])[:5]}
LOW_RANK = {
    "a prior": (
        "equal",
        lambda x: jf.low_rank(of_rows(x) + jf.scaled_identity(jnp.zeros(6), 0.7), 3),
        lambda x: kept_pairs(mean_square(x), 3) + 0.7 * np.eye(6),
    ),
    "dense": ("equal", lambda x: jf.low_rank(jf.dense(of_rows(x)), 3), lambda x: kept_pairs(mean_square(x), 3)),
    "sketch": ("equal", lambda x: jf.sketch(of_rows(x), 3), lambda x: kept_pairs(mean_square(x), 3, less=True)),
    "nearly equal": ("near", lambda x: jf.low_rank(of_rows(x), 5), mean_square),
    "more than the rows": (
        "near",
        lambda x: jf.merge(jf.sketch(of_rows(jnp.cos(x[:2])), 3), jf.sketch(of_rows(x[3:]), 3)),
        lambda x: kept_pairs(0.5 * (mean_square(np.cos(x[:2])) + mean_square(x[3:])), 3, less=True),
    ),
    "zeros": (
        "equal",
        lambda x: jf.low_rank(of_rows(x * np.array([[1.0], [1], [1], [0], [0]])), 4),
        lambda x: mean_square(x * np.array([[1.0], [1], [1], [0], [0]])),
    ),
}
"""Inputs, views, and the matrices of these."""


@pytest.mark.parametrize("name", LOW_RANK)
def test_derivatives_of_low_rank_views_where_eigenvalues_are_equal_or_zero(name):
    """The first ones are right; the second ones are right or NaN. The true ones are differences along a line, in NumPy."""
    case, make, true = LOW_RANK[name]
    x, u, c = APART_BY[case], U[:6], C[:6]
    along = np.random.default_rng(0).normal(size=x.shape)

    def found(t):
        F = make(x + t * along)
        return jnp.stack([c @ F.mv(u), c @ F.as_matrix() @ u, c @ F.power_mv(u, 0.5, 0.3), F.logdet(0.3)])

    def expected(t):
        matrix = true(x + t * along)
        values, vectors = np.linalg.eigh(matrix + 0.3 * np.eye(6))
        root = c @ (vectors * np.sqrt(values)) @ vectors.T @ u
        return np.stack([c @ matrix @ u, c @ matrix @ u, root, np.sum(np.log(values))])

    def derivatives(t):
        slope = lambda t: jax.jvp(found, (t,), (1.0,))[1]  # noqa: E731
        return *jax.jvp(slope, (t,), (1.0,)), jax.jacrev(found)(t)

    first, second, back = evaluated(derivatives, 0.0)
    step, near = 4e-3, [expected(4e-3 * k) for k in range(-4, 5)]
    weights = np.array([1 / 280, -4 / 105, 0.2, -0.8])
    slopes = np.concatenate([weights, [0], -weights[::-1]]) @ near / step
    weights = np.array([-1 / 560, 8 / 315, -0.2, 1.6])
    bends = np.concatenate([weights, [-205 / 72], weights[::-1]]) @ near / step**2
    for one in (first, back):
        np.testing.assert_allclose(one, slopes, rtol=1e-8, atol=1e-8)
    assert np.all(np.isnan(second) | np.isclose(second, bends, rtol=1e-6, atol=1e-6)), (second, bends)
    assert np.all(np.isnan(second)) == (case == "equal")


@pytest.mark.parametrize("form", FORMS)
def test_a_product_is_linear_to_jax_and_its_transpose_is_the_product(form):
    """`jax.linear_transpose` needs no derivative, and refuses a program that compares or scales by the size of the vector."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)))
    F = jax.tree.map(jnp.asarray, evaluated(FORMS[form][0], PARAMS, x))
    v = F.spec.unravel(U)
    found, true = evaluated(lambda v: (jax.linear_transpose(F.mv, v)(v)[0], F.mv(v)), v)
    np.testing.assert_allclose(*(ravel_pytree(tree)[0] for tree in (found, true)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"center": True}])
def test_scores_are_linear_to_jax_and_their_transpose_is_theirs(options):
    x, w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3))), jnp.cos(jnp.arange(3.0))

    def both(v):
        S = jf.scores(jf.log_likelihood(model), **options)(PARAMS, x, jnp.ones((3, 2)))
        pairs = (jax.linear_transpose(S.mv, v)(w)[0], S.rmv(w)), (jax.linear_transpose(S.rmv, w)(v)[0], S.mv(v))
        return [[ravel_pytree(tree)[0] for tree in pair] for pair in pairs]

    for found, true in evaluated(both, PARAMS):
        np.testing.assert_allclose(found, true, rtol=1e-13, atol=1e-13)
