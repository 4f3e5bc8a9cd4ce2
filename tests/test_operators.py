"""The laws of operators for every form, and their failure for broken ones; sums, restriction, lineax, and retracing."""

import dataclasses
import functools
import pickle

import jax
import jax.flatten_util
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
from problems import assert_close, class_sum_fisher, classifier, flat, reference
from programs.evaluate import evaluated, traced

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")  # one of each form has its laws compiled, in float32

LOG_PROB = jf.log_likelihood(classifier)
MLP_DAMPING = {"hidden": {"b": 0.3, "w": 0.1}, "out": [0.05, 0.7]}


def layer_factors(params, x, weights=None):
    """Inputs (with a column of ones) and output cotangents of both layers: ``[n, inputs]``, and ``[n, classes, outputs]``.

    There is one row for each class, times the root of its probability, so that sums over classes are expectations.
    """
    w1, b1 = (np.asarray(params["hidden"][k], np.float64) for k in ("w", "b"))
    w2, b2 = (np.asarray(leaf, np.float64) for leaf in params["out"])
    x = np.asarray(x, np.float64)
    hidden = np.tanh(x @ w1 + b1)
    logits = hidden @ w2 + b2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    out = np.sqrt(p)[:, :, None] * (np.eye(p.shape[1])[None] - p[:, None, :])
    back = (out @ w2.T) * (1 - hidden**2)[:, None, :]
    one = np.ones((len(x), 1))
    return (np.hstack([x, one]), back), (np.hstack([hidden, one]), out)


def by_layer(*blocks):
    """One matrix from a block for each layer, with a layer's weight before its bias, in the order of the parameters."""
    first, second = blocks
    turn = np.r_[12:16, 0:12]
    full = np.zeros((31, 31))
    full[:16, :16], full[16:, 16:] = first[np.ix_(turn, turn)], second
    return full


def kronecker_reference(params, x):
    """The Kronecker product of second moments for each layer, scaled to the trace of the layer's block."""
    blocks = []
    for a, g in layer_factors(params, x):
        block = np.kron(a.T @ a, np.einsum("nco,ncq->oq", g, g))
        trace = np.mean(np.sum(a**2, 1) * np.sum(g**2, (1, 2)))
        blocks.append(block * (trace / np.trace(block)))
    return by_layer(*blocks)


def eigen_kronecker_reference(params, x):
    blocks = []
    for a, g in layer_factors(params, x):
        bases = [np.linalg.eigh(m)[1] for m in (a.T @ a / len(x), np.einsum("nco,ncq->oq", g, g) / len(x))]
        basis = np.kron(*bases)
        rows = np.einsum("ni,nco->ncio", a, g).reshape(-1, len(basis)) / np.sqrt(len(x))
        blocks.append((basis * np.sum(np.square(rows @ basis), 0)) @ basis.T)
    return by_layer(*blocks)


def covariance(rows, omega):
    rows, omega = np.asarray(rows, float), np.asarray(omega, float)
    centred = rows - omega @ rows
    return centred.T @ (omega[:, None] * centred)


def truncated(matrix, rank):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T


def shrunk(matrix, rank):
    """The largest eigenpairs, with eigenvalues reduced by the largest one that is left out."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors[:, -rank:] * (values[-rank:] - values[-rank - 1])) @ vectors[:, -rank:].T


def masked(matrix, *groups):
    """A matrix without its entries between different groups of places."""
    full = np.zeros_like(matrix)
    for group in groups:
        full[np.ix_(group, group)] = matrix[np.ix_(group, group)]
    return full


def made(function):
    """The result of a function without arguments, run in NumPy, since compiling its many small programs is slow."""
    return jax.tree.map(jnp.asarray, evaluated(function))


LEAVES = [np.r_[0:4], np.r_[4:16], np.r_[16:28], np.r_[28:31]]
LAYERS = [np.r_[0:16], np.r_[16:31]]


class Problem:
    """The operators from which the forms are made, in some dtype, and the dense matrices, always in float64."""

    def __init__(self, dtype):
        params, x, self.y, weights, self.rows = reference()
        self.wide, self.omega = (params, x), np.asarray(weights) / np.sum(np.asarray(weights))
        self.params, self.x, self.weights = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x, weights))
        self.empirical, self.exact = self.rows.T @ self.rows / len(self.rows), class_sum_fisher(params, x)
        self.identity, self.kronecker = np.eye(31), kronecker_reference(*self.wide)
        self.weighted = class_sum_fisher(params, x, self.omega)
        self.F, self.E, self.implicit, self.prior = made(self.makers)

    def makers(self):
        E = jf.exact_fisher(classifier)(self.params, self.x)
        F = jf.empirical_fisher(LOG_PROB)(self.params, self.x, self.y)
        return F, E, jf.implicit_fisher(classifier)(self.params, self.x), jf.scaled_identity(E, 0.25)


problem = functools.cache(Problem)

FORMS = {
    "scores, fewer rows": lambda p: (p.F, p.empirical),
    "scores, more rows": lambda p: (jf.exact_fisher(classifier)(p.params, jnp.tile(p.x, (2, 1))), p.exact),
    "scores, weighted": lambda p: (
        jf.empirical_fisher(LOG_PROB)(p.params, p.x, p.y, weights=p.weights),
        p.rows.T @ (p.omega[:, None] * p.rows),
    ),
    "scores, centred": lambda p: (
        jf.empirical_fisher(LOG_PROB, center=True)(p.params, p.x, p.y),
        covariance(p.rows, np.full(7, 1 / 7)),
    ),
    "scores, centred, in pieces, weighted": lambda p: (
        jf.fisher_from_scores(jf.scores(LOG_PROB, center=True, batch_size=3)(p.params, p.x, p.y, weights=p.weights)),
        covariance(p.rows, p.omega),
    ),
    "scores, streamed": lambda p: (jf.empirical_fisher(LOG_PROB, batch_size=3)(p.params, p.x, p.y), p.empirical),
    "dense": lambda p: (jf.dense(p.E), p.exact),
    "diagonal": lambda p: (jf.diagonal(p.E), np.diag(np.diag(p.exact))),
    "implicit": lambda p: (p.implicit, p.exact),
    "implicit, streamed": lambda p: (
        jf.implicit_fisher(classifier, batch_size=2)(p.params, p.x, weights=p.weights),
        p.weighted,
    ),
    "implicit, views of another": lambda p: (jf.implicit_fisher(classifier)(p.params, p.x, views_of=p.F), p.exact),
    "multiple of scores": lambda p: (0.25 * p.F, 0.25 * p.empirical),
    "multiple of implicit": lambda p: (p.implicit * 3.0, 3 * p.exact),
    "sum of scores": lambda p: (p.F + p.E, p.empirical + p.exact),
    "sum of dense": lambda p: (jf.dense(p.F) + jf.dense(p.E), p.empirical + p.exact),
    "sum of diagonals": lambda p: (jf.diagonal(p.F) + jf.diagonal(p.E), np.diag(np.diag(p.empirical + p.exact))),
    "sum of forms": lambda p: (
        2 * (p.F + p.implicit) + jf.diagonal(p.E),
        2 * (p.empirical + p.exact) + np.diag(np.diag(p.exact)),
    ),
    "blocks, a leaf": lambda p: (jf.block_diagonal(p.E), masked(p.exact, *LEAVES)),
    "blocks, a layer, dense": lambda p: (jf.block_diagonal(p.E, jf.layers(p.E), view=jf.dense), masked(p.exact, *LAYERS)),
    "blocks, a prefix": lambda p: (
        jf.block_diagonal(p.implicit, {"hidden": "all", "out": ["w", "all"]}),
        masked(p.exact, np.r_[0:16, 28:31], np.r_[16:28]),
    ),
    "multiple of blocks": lambda p: (0.5 * jf.block_diagonal(p.F), 0.5 * masked(p.empirical, *LEAVES)),
    "blocks and a diagonal": lambda p: (
        jf.block_diagonal(p.E) + jf.diagonal(p.E),
        masked(p.exact, *LEAVES) + np.diag(np.diag(p.exact)),
    ),
    "kronecker": lambda p: (jf.kronecker(p.E), p.kronecker),
    "kronecker, of a multiple": lambda p: (jf.kronecker(3.0 * p.E), 3 * p.kronecker),
    "kronecker, streamed": lambda p: (
        jf.kronecker_reduce(jf.exact_fisher(classifier, batch_size=3)(p.params, p.x)),
        p.kronecker,
    ),
    "kronecker, of implicit": lambda p: (2 * jf.kronecker(p.implicit), 2 * p.kronecker),
    "sum of kronecker": lambda p: (jf.kronecker(p.E) + jf.kronecker(p.E), 2 * p.kronecker),
    "kronecker and dense": lambda p: (jf.kronecker(p.E) + jf.dense(p.E), p.kronecker + p.exact),
    "eigen-kronecker": lambda p: (jf.eigen_kronecker(p.E), eigen_kronecker_reference(*p.wide)),
    "low rank": lambda p: (jf.low_rank(p.E, 5), truncated(p.exact, 5)),
    "sketch": lambda p: (jf.sketch(p.E, 5), shrunk(p.exact, 5)),
    "low rank, all": lambda p: (jf.low_rank(p.F, 7), p.empirical),
    "low rank of dense": lambda p: (jf.low_rank(jf.dense(p.E), 9), truncated(p.exact, 9)),
    "nystrom, all": lambda p: (jf.nystrom(p.E, jax.random.key(1), 20), p.exact),
    "partial cholesky, all": lambda p: (jf.partial_cholesky(p.E, 20), p.exact),
    "identity": lambda p: (p.prior, 0.25 * p.identity),
    "prior and scores": lambda p: (p.E + p.prior, p.exact + 0.25 * p.identity),
    "kronecker of a prior and scores": lambda p: (jf.kronecker(p.E + p.prior), p.kronecker + 0.25 * p.identity),
    "prior and kronecker": lambda p: (2 * (p.prior + jf.kronecker(p.E)), 2 * p.kronecker + 0.5 * p.identity),
    "priors": lambda p: ((p.E + p.prior) + (p.F + p.prior) + p.prior, p.exact + p.empirical + 0.75 * p.identity),
    "diagonal prior": lambda p: (p.E + jf.diagonal(p.E) + p.prior, p.exact + np.diag(np.diag(p.exact)) + 0.25 * p.identity),
}
"""Every form with the dense float64 matrix that it must equal, computed by loops over examples, classes and layers."""


@functools.cache
def form(name, dtype=jnp.float64):
    """A form and its dense matrix."""
    p = problem(dtype)
    F, dense = made(lambda: FORMS[name](p))
    return F, np.asarray(dense)


EIGEN_FORMS = ("eigen-kronecker", "low rank", "sketch", "nystrom", "partial cholesky")
"""Forms whose eigenvectors change if leaves are scaled one by one, so that they refuse a damping by leaf."""


EPS_OF_A_SKETCH = 100 * float(np.finfo(float).eps)
"""The Nystrom sketch adds a shift of ten times the rounding error and subtracts it again."""


def check_operator(F, dense, key, eps=None, by_leaf=True):
    """Check all laws against the dense float64 matrix. Only the damping by leaf of a form that refuses it is undecided."""
    laws = jf.check_laws(F, key=key, matrix=dense, rounding=eps)
    assert laws.passed, laws
    assert laws.undecided == (() if by_leaf else ("(F + D)^-1 v",)), laws


def flat_jax(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


def leaf_damping(name):
    return not name.startswith(EIGEN_FORMS)


@pytest.mark.parametrize("name", FORMS)
def test_every_law_for_every_form(name, key):
    F, dense = form(name)
    eps = EPS_OF_A_SKETCH if name.startswith("nystrom") else None
    check_operator(F, dense, key, eps=eps, by_leaf=leaf_damping(name))


def asked(F, v):
    return {
        "mv": F.mv(v),
        "matrix": F.as_matrix(),
        "diagonal": F.diagonal(),
        "trace": F.trace(),
        "quadratic": F.quadratic(v),
        "solve": F.solve(v, 0.1),
        "solve by leaf": F.solve(v, MLP_DAMPING),
        "logdet": F.logdet(0.1),
        "eigenvalues": F.eigvalsh(),
        "norm": F.frobenius_norm(),
        "root": F.sqrt_mv(v, 0.1),
    }


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["scores, fewer rows", "kronecker", "prior and scores"])
def test_a_call_outside_jit_gives_what_one_inside_gives(name, key):
    F, _ = form(name)
    v = F.spec.unravel(jax.random.normal(key, (F.size,)))
    inside = evaluated(asked, F, v)
    for what, value in asked(F, v).items():
        assert_close(flat(value), flat(inside[what]), factor=1e4)
    # A batch of vectors gives the results of its members, from one factorisation.
    both = jax.tree.map(lambda leaf: np.stack([leaf, 1 - np.asarray(leaf)]), v)
    solved = evaluated(jax.vmap(lambda v: (F.mv(v), F.solve(v, 0.1))), both)
    for i in range(2):
        single, member = (jax.tree.map(lambda leaf, i=i: leaf[i], tree) for tree in (both, solved))
        assert_close(flat(member[0]), flat(F.mv(single)), factor=100)
        assert_close(flat(member[1]), flat(F.solve(single, 0.1)), factor=1e4)


ONE_OF_EACH = (
    "scores, fewer rows",
    "scores, centred",
    "dense",
    "implicit",
    "blocks, a layer, dense",
    "kronecker",
    "eigen-kronecker",
    "low rank",
    "prior and scores",
)


@pytest.mark.compiled
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_law_in_float32(name, key):
    """The laws for parameters and data in float32; the dense matrices stay in float64."""
    F, dense = form(name, jnp.float32)
    assert F.spec.dtype == F.as_matrix().dtype == jnp.float32
    # The parameters, the data and the arithmetic are rounded, and networks lose a digit or two.
    check_operator(F, dense, key, eps=20 * float(np.finfo(np.float32).eps), by_leaf=leaf_damping(name))


BODIES = {
    "a bare vector": (lambda w, x: x @ w, jnp.array([0.3, -0.2, 0.5])),
    "scalars in a tuple": (lambda p, x: p[0] * x[0] + jnp.tanh(p[1] * x[1]), (jnp.array(0.5), jnp.array(-1.0))),
    "nested, with nothing in places": (
        lambda p, x: jnp.tanh(x @ p[0][0]) @ p[1]["v"] + p[1]["c"],
        (
            [jnp.array([[0.3, -0.1], [0.2, 0.4], [-0.5, 0.6]])],
            {"c": jnp.array(0.1), "none": None, "v": jnp.array([1.0, -2.0])},
            (),
        ),
    ),
    # Its scores are whole numbers, so statistics are accurate to float32, in which they are kept.
    "bfloat16": (lambda w, x: x @ w, jnp.array([0.3, -0.2, 0.5], jnp.bfloat16)),
}
"""Functions of parameters of every shape and of three numbers: the means of a normal whose scale is 1/2."""
VIEWS = {
    "scores": lambda F: F,
    "blocks": jf.block_diagonal,
    "low rank": lambda F: jf.low_rank(F, min(F.size, 5)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("body", BODIES)
def test_every_law_for_every_shape(body, view, key):
    mean, params = BODIES[body]
    dtype = jax.tree.leaves(params)[0].dtype
    x = jnp.array([[1, -2, 0], [3, 1, 2], [0, 1, -1], [2, 2, 1], [-1, 0, 3]], dtype)
    fisher = jf.exact_fisher(lambda p, x: jf.Normal(mean(p, x), jnp.asarray(0.5, dtype)))
    F = made(lambda: VIEWS[view](fisher(params, x)))
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x))
    gradient = traced(jax.jacfwd(mean))
    rows = np.stack([flat(gradient(exact[0], row)) for row in exact[1]])
    dense = 4 * rows.T @ rows / 5
    if view == "blocks":
        dense = masked(dense, *np.split(np.arange(F.size), np.cumsum(F.spec.sizes)[:-1]))
    statistics = jnp.float32 if dtype == jnp.bfloat16 else dtype
    assert F.spec.dtype == F.as_matrix().dtype == statistics
    by_leaf = view != "low rank" or len(F.spec.paths) == 1
    check_operator(F, dense, key, eps=20 * float(np.finfo(statistics).eps), by_leaf=by_leaf)


@pytest.mark.parametrize("name", [name for name in FORMS if not leaf_damping(name)])
def test_a_damping_for_each_leaf_is_refused_where_it_would_not_be_exact(name):
    F, _ = form(name)
    with pytest.raises((NotImplementedError, ValueError), match="damping"):
        F.solve(F.spec.zeros(), MLP_DAMPING)


@functools.cache
def dense_form():
    """The correct operator, from which the broken ones are made."""
    return form("dense")[0]


def broken(**methods):
    """`dense_form` with some methods replaced."""
    good = dense_form()
    cls = jf.array_fields("matrix", repr=False)(type("Broken", (type(good.form),), methods))
    return jf.Operator(cls(good.form.matrix, good.spec), good.provenance)


def with_matrix(change):
    """`dense_form` with another matrix."""
    good = dense_form()
    return dataclasses.replace(good, form=dataclasses.replace(good.form, matrix=change(good.form.matrix)))


def usual(name, *arguments):
    """The result of the correct method."""
    return getattr(type(dense_form().form), name)(*arguments)


BROKEN = {
    "scaled product": lambda: broken(product=lambda self: lambda v: jax.tree.map(lambda leaf: 2 * leaf, v)),
    "not symmetric": lambda: with_matrix(lambda matrix: matrix.at[0, 1].add(0.01)),
    "indefinite": lambda: with_matrix(lambda matrix: matrix - 0.5 * jnp.eye(len(matrix))),
    "affine": lambda: broken(product=lambda self: lambda v: jax.tree.map(lambda leaf: leaf + 1, v)),
    "wrong diagonal": lambda: broken(diagonal=lambda self: self.spec.unravel(jnp.diagonal(self.matrix) + 1e-3)),
    "wrong trace": lambda: broken(trace=lambda self: 1.001 * jnp.trace(self.matrix)),
    "twice the inner products": lambda: broken(inner_products=lambda self, vectors: 2 * usual("inner_products", self, vectors)),
    "relative damping": lambda: broken(inverse=lambda self, damping: usual("inverse", self, damping * jnp.trace(self.matrix))),
    "sum of eigenvalues": lambda: broken(logdet=lambda self, damping: jnp.sum(self.eigvalsh() + damping)),
    "descending": lambda: broken(eigvalsh=lambda self: usual("eigvalsh", self)[::-1]),
    "doubled norm": lambda: broken(frobenius_norm=lambda self: 2 * jnp.linalg.norm(self.matrix)),
    "full rank": lambda: broken(rank=lambda self: jnp.asarray(len(self.matrix))),
    "one damping for all leaves": lambda: broken(
        with_unit_damping=lambda self, dampings: usual("with_unit_damping", self, [dampings[0]] * len(dampings))
    ),
    "inverse for root": lambda: broken(power_mv=lambda self, v, power, damping: usual("power_mv", self, v, 2 * power, damping)),
}
"""Dense operators, each broken in one way."""


@pytest.mark.parametrize("name", BROKEN)
def test_the_laws_see_a_broken_operator(name, key):
    with pytest.raises(AssertionError):
        check_operator(BROKEN[name](), form("dense")[1], key)


def test_inner_products_of_an_implicit_fisher_take_no_transposed_product():
    """Inner products of two vectors take two jvps instead of four passes: at most 0.7 of the operations, as XLA counts."""
    params, x, *_ = reference()
    F = jf.implicit_fisher(classifier)(params, jnp.tile(x, (20, 1)))
    vectors = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)

    def flops(of):
        return jax.jit(of).lower(F, vectors).compile().cost_analysis()["flops"]

    assert flops(lambda F, v: F.form.inner_products(v)) < 0.7 * flops(lambda F, v: jax.vmap(F.form.product())(v))


@pytest.mark.parametrize("name", FORMS)
def test_restriction_is_the_principal_submatrix(name):
    F, dense = form(name)
    paths = F.spec.paths
    keep = tuple("hidden" in path for path in paths)
    index = np.flatnonzero(np.repeat(keep, F.spec.sizes))
    v = jax.tree.unflatten(F.spec.treedef, [jnp.ones(s) if k else None for s, k in zip(F.spec.shapes, keep, strict=True)])
    close = functools.partial(assert_close, eps=EPS_OF_A_SKETCH if name.startswith("nystrom") else None)
    expected = dense[np.ix_(index, index)]
    # With the same provenance, operators of one form have one structure and share a program.
    matrix, product, parts = numbers_of_parts(dataclasses.replace(F, provenance=dense_form().provenance), v)
    close(matrix, expected)
    close(flat(product), expected @ np.ones(16))
    for found, inside in zip(parts, (slice(0, 4), slice(4, 16)), strict=True):
        close(found, expected[inside, inside])


@traced
def numbers_of_parts(F, v):
    part = F.restrict(lambda path: "hidden" in path)
    again = [part.restrict(lambda path, name=name: path.endswith(f"['{name}']")) for name in ("b", "w")]
    return part.as_matrix(), part.mv(v), [leaf.as_matrix() for leaf in again]


@pytest.mark.parametrize("name", FORMS)
def test_crosses_jit_with_one_trace(name):
    F, _ = form(name)
    traces = []

    @jax.jit
    def product(F, v):
        traces.append(1)
        return F.mv(v)

    v = F.spec.zeros()
    # The test counts traces, so nothing is compiled.
    product.trace(F, v)
    product.trace(jax.tree.map(lambda leaf: leaf * 2 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, F), v)
    assert len(traces) == 1


def test_operators_made_anew_cause_no_second_trace():
    """Equal functions give equal static parts, also in streamed and implicit operators, which hold their functions."""
    params, x, y, _, _ = reference()
    traces = []

    @jax.jit
    def trace_of(F):
        traces.append(type(F))
        return F.diagonal()

    for shift in (0.0, 0.1):
        moved = jax.tree.map(lambda leaf, shift=shift: leaf + shift, params)
        trace_of(jf.empirical_fisher(LOG_PROB, batch_size=3)(moved, x, y))
        trace_of(jf.implicit_fisher(classifier)(moved, x))
        trace_of(jf.exact_fisher(classifier)(moved, x))
    assert len(traces) == 3


def test_results_take_the_vector_s_dtype_and_matrices_the_statistics_dtype():
    F, _ = form("scores, fewer rows")
    v = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), F.spec.zeros())
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(F.mv(v)))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(F.solve(v, 0.1)))
    assert F.as_matrix().dtype == F.trace().dtype == jnp.float64


def test_vmap_over_vectors_and_dampings(key):
    F, dense = form("scores, fewer rows")
    v = np.asarray(jax.random.normal(key, (3, F.size)))
    dampings = np.array([0.01, 0.1, 1.0])
    solved = evaluated(jax.vmap(lambda v, d: flat_jax(F.solve(F.spec.unravel(v), d))), v, dampings)
    for row, vector, damping in zip(solved, v, dampings, strict=True):
        assert_close(row, np.linalg.solve(dense + damping * np.eye(F.size), vector), factor=1e5)


def test_gradient_through_a_solve_and_a_logdet():
    """Derivatives by the damping against their closed forms, -v^T (F + d)^-2 v and tr (F + d)^-1."""
    for name in ("scores, fewer rows", "scores, more rows", "dense", "diagonal"):
        F, dense = form(name)
        v = np.cos(np.arange(F.size))

        def both(d, F=F, v=v):
            return v @ flat_jax(F.solve(F.spec.unravel(jnp.asarray(v)), d)), F.logdet(d)

        inverse = np.linalg.inv(dense + 0.3 * np.eye(F.size))
        slopes = evaluated(jax.jacrev(both), 0.3)
        np.testing.assert_allclose(slopes[0], -v @ inverse @ inverse @ v, rtol=1e-8, err_msg=name)
        np.testing.assert_allclose(slopes[1], np.trace(inverse), rtol=1e-8, err_msg=name)


def test_round_trips():
    for F, _ in map(form, FORMS):
        leaves, treedef = jax.tree.flatten(F)
        again = jax.tree.unflatten(treedef, leaves)
        assert repr(again) == repr(F) and again.spec == F.spec
    F, dense = form("scores, weighted")
    assert_close(pickle.loads(pickle.dumps(jf.dense(F))).as_matrix(), dense)


def test_as_lineax_solves_with_any_lineax_solver():
    F, dense = form("implicit")
    v = F.spec.unravel(jnp.cos(jnp.arange(F.size, dtype=float)))
    assert lineax.is_positive_semidefinite(jf.as_lineax(F))

    def solved(F, v, damping):
        damped = jf.as_lineax(F + jf.scaled_identity(F, damping))
        assert lineax.is_positive_semidefinite(damped)
        solvers = lineax.CG(rtol=1e-12, atol=1e-12), lineax.Cholesky(), lineax.AutoLinearSolver(well_posed=True)
        return [lineax.linear_solve(damped, v, solver).value for solver in solvers], jf.as_lineax(F).as_matrix()

    solutions, matrix = evaluated(solved, F, v, 0.1)
    for solution in solutions:
        np.testing.assert_allclose(flat(solution), np.linalg.solve(dense + 0.1 * np.eye(F.size), flat(v)), rtol=1e-8)
    assert_close(matrix, dense)
