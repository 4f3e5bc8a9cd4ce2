"""Views of sums of all forms: exact views are those of the dense sum, and Kronecker views have its trace on every leaf."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, flat
from programs.evaluate import traced

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

# Predictions are linear in the parameters, so that the Kronecker view of every single term is exact.

SHAPES = {"b": (2,), "c": (2,), "e": (2, 3), "s": (3,), "t": (4, 2), "u": (2, 2, 2), "v": (3, 2), "w": (3, 2)}
"""The leaves in the order of the pytree. Both ``w`` and ``e`` are weights of three inputs; ``e`` has its outputs first."""
PLACES = {}
for _name, _shape in SHAPES.items():
    _start = sum(part.size for part in PLACES.values())
    PLACES[_name] = np.arange(_start, _start + np.prod(_shape)).reshape(_shape)
SIZE = sum(part.size for part in PLACES.values())


GROUPS = {"b": 0, "c": 1, "e": 1, "s": 2, "t": 2, "u": 2, "v": 3, "w": 0}
"""The labels of a block-diagonal view: leaves with the same label form a block."""


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


PARAMS = {name: numbers(seed, *shape) for seed, (name, shape) in enumerate(SHAPES.items())}


def layered(p, x):
    """Two layers with their biases."""
    return jnp.concatenate([x @ p["w"] + p["b"], p["e"] @ x + p["c"]])


def bare(p, x):
    """The same weights without their biases, and a third weight."""
    return jnp.concatenate([2.0 * (x @ p["w"]), x @ p["v"], p["e"] @ x])


def apart(p, x):
    """A weight, and leaves without factors: a bias that multiplies inputs, a scale, and a row of a table."""
    return jnp.concatenate([x @ p["w"], p["b"] * x[:2], p["s"] * x, p["t"][1]])


def stacked(p, x):
    """A stack of two weights, each used by itself."""
    return jnp.concatenate([x[:2] @ p["u"][0], x[1:] @ p["u"][1]])


def whole(p, x):
    """The same leaf, used as one matrix."""
    return jnp.einsum("gi,gio->o", jnp.stack([x[:2], x[1:]]), p["u"])


LAYERS = {
    layered: {"w": "b", "e": "c"},
    bare: {"w": None, "v": None, "e": None},
    apart: {"w": None},
    stacked: {"u": None},
    whole: {"u": None},
}
"""The weights that have factors in a model, and their biases."""


@dataclasses.dataclass(frozen=True)
class Term:
    """A term of a sum: its dense matrix, the layers with factors in it, and whether these are those of a stack."""

    dense: np.ndarray
    layers: dict[str, str | None] = dataclasses.field(default_factory=dict)
    stack: bool = False

    def times(self, factor):
        return dataclasses.replace(self, dense=factor * self.dense)


def normal(mean, scale):
    """A normal model with another scale for each output, so that no eigenvalue occurs twice."""

    def model(p, x):
        made = mean(p, x)
        return jf.Normal(made, jnp.asarray(scales(made.size, scale)))

    return model


def scales(count, scale):
    return scale * (1.0 + 0.3 * np.arange(count))


CASES = {
    "held": (layered, 0, 5, 1.0),
    "streamed": (bare, 1, 5, 1.0),
    "alone": (apart, 2, 5, 0.5),
    "stack": (stacked, 3, 5, 1.0),
    "whole": (whole, 4, 5, 1.0),
    "implicit": (bare, 5, 4, 1.0),
    "other": (layered, 6, 6, 2.0),
    "bare": (bare, 7, 4, 0.7),
}
"""For each Fisher: its model, the seed and number of its inputs, and the scale of its outputs."""


def fisher_of(case, fisher=jf.exact_fisher, **options):
    mean, seed, n, scale = CASES[case]
    return fisher(normal(mean, scale), **options)(PARAMS, numbers(seed, n, 3))


def term_of(case):
    """The Fisher of a case by its definition, in NumPy, from Jacobians of the mean."""
    mean, seed, n, scale = CASES[case]
    rows = rows_of(traced(jax.vmap(jax.jacfwd(mean), (None, 0)))(PARAMS, numbers(seed, n, 3)), 2)
    rows = rows / scales(rows.shape[1], scale)[None, :, None]
    return Term(np.einsum("nip,niq->pq", rows, rows) / n, LAYERS[mean], mean is stacked)


def rows_of(tree, axes):
    return np.concatenate([np.asarray(leaf).reshape(*leaf.shape[:axes], -1) for leaf in jax.tree.leaves(tree)], axes)


LOG_PROB = jf.log_likelihood(normal(layered, 1.0))
OBSERVED = numbers(20, 5, 3), numbers(21, 5, 4)


def centred_term():
    """The covariance of the scores of `layered` as a term, by its definition."""
    rows = rows_of(traced(jax.vmap(jax.grad(LOG_PROB), (None, 0, 0)))(PARAMS, *OBSERVED), 1)
    rows = rows - rows.mean(0)
    return Term(rows.T @ rows / 5)


def masked(matrix, *groups):
    full = np.zeros_like(matrix)
    for group in groups:
        places = np.concatenate([np.zeros(0, int), *(PLACES[name].ravel() for name in group)])
        full[np.ix_(places, places)] = matrix[np.ix_(places, places)]
    return full


def truncated(matrix, rank):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T


@functools.cache
def forms():
    """An operator of every form, and of every way in which a leaf can have factors or none."""

    def make():
        held, alone, other = (fisher_of(case) for case in ("held", "alone", "other"))
        streamed, implicit = fisher_of("streamed", batch_size=3), fisher_of("implicit", jf.implicit_fisher)
        identity = jf.scaled_identity(PARAMS, 0.2)
        return {
            "streamed": streamed,
            "stack": fisher_of("stack"),
            "whole": fisher_of("whole"),
            "joined": 100.0 * held + alone,
            "centred": jf.fisher_from_scores(jf.scores(LOG_PROB, center=True)(PARAMS, *OBSERVED)),
            "dense": jf.dense(alone),
            "diagonal": jf.diagonal(alone),
            "identity": jf.scaled_identity(PARAMS, 0.3),
            "blocks": jf.block_diagonal(alone, GROUPS),
            "shifted blocks": jf.block_diagonal(other + identity, jf.layers(other)),
            "kronecker": jf.kronecker(held),
            "eigen": jf.eigen_kronecker(other),
            "low rank": jf.low_rank(other, 3),
            "implicit": implicit,
            "sum": 2.0 * (fisher_of("bare") + jf.dense(alone)),
        }

    return traced(make)()


@functools.cache
def terms():
    """The terms of which each of the `forms` is the sum."""
    held, streamed, alone, implicit, other = (term_of(case) for case in ("held", "streamed", "alone", "implicit", "other"))

    def only(term, *groups):
        return dataclasses.replace(term, dense=masked(term.dense, *groups))

    layers = ["w", "b"], ["e", "c"], "s", "t", "u", "v"
    identity = Term(0.2 * np.eye(SIZE))
    return {
        "streamed": [streamed],
        "stack": [term_of("stack")],
        "whole": [term_of("whole")],
        "joined": [held.times(100), alone],
        "centred": [centred_term()],
        "dense": [Term(alone.dense)],
        "diagonal": [Term(np.diag(np.diag(alone.dense)))],
        "identity": [Term(0.3 * np.eye(SIZE))],
        "blocks": [only(alone, "bw", "ce", "stu", "v")],
        "shifted blocks": [only(other, *layers), identity],
        "kronecker": [only(held, *layers)],
        "eigen": [only(other, *layers)],
        "low rank": [Term(truncated(other.dense, 3))],
        "implicit": [implicit],
        "sum": [term_of("bare").times(2), Term(2 * alone.dense)],
    }


NAMES = [
    "blocks",
    "centred",
    "dense",
    "diagonal",
    "eigen",
    "identity",
    "implicit",
    "joined",
    "kronecker",
    "low rank",
    "shifted blocks",
    "stack",
    "streamed",
    "sum",
    "whole",
]


# Each form is in four of seven sums, and no two forms are in the same four. So any two forms are in one sum together, and each
# of the two is in a sum without the other.
_FOURS = list(itertools.combinations(range(7), 4))
SUMS = [tuple(name for i, name in enumerate(NAMES) if row in _FOURS[i * len(_FOURS) // len(NAMES)]) for row in range(7)]
EIGENPAIRS = 3
"""How many eigenpairs the low-rank view keeps. No sum has a repeated eigenvalue among them."""


@functools.cache
def views(names):
    """The matrices of every view of a sum, by one program; the views by layers are of the sum without its centred term."""

    def make(operators):
        total, layered = (
            functools.reduce(lambda a, b: a + b, [operators[name] for name in names if name != without])
            for without in (None, "centred")
        )
        made = {
            "dense": jf.dense(total),
            "diagonal": jf.diagonal(total),
            "blocks": jf.block_diagonal(total, GROUPS),
            "low rank": jf.low_rank(total, EIGENPAIRS),
            "expand": jf.kronecker(layered),
            "eigen": jf.eigen_kronecker(layered),
        }
        return {name: view.as_matrix() for name, view in made.items()}

    return {name: np.asarray(matrix) for name, matrix in traced(make)(forms()).items()}


def terms_of(names, without=()):
    return [term for name in names if name not in without for term in terms()[name]]


def shift_of(terms):
    """The sum of the factors of those terms that are a multiple of the identity."""
    return sum(term.dense[0, 0] for term in terms if np.array_equal(term.dense, term.dense[0, 0] * np.eye(SIZE)))


def product(matrix, places):
    """For each group, the Kronecker product with the partial traces of the matrix; rows of places are inputs."""
    full = np.zeros_like(matrix)
    for index, a, g in factors(matrix, places):
        full[index] = np.kron(a, g) / np.trace(a)
    return full


def rotated(matrix, basis, places):
    """A matrix without its off-diagonal entries in the eigenvectors of another matrix's Kronecker product."""
    full = np.zeros_like(matrix)
    for index, a, g in factors(basis, places):
        turn = np.kron(np.linalg.eigh(a)[1], np.linalg.eigh(g)[1])
        full[index] = (turn * np.diag(turn.T @ matrix[index] @ turn)) @ turn.T
    return full


def factors(matrix, places):
    """For each group: the index of its block and the block's two partial traces."""
    for group in places:
        index = np.ix_(group.ravel(), group.ravel())
        block = matrix[index].reshape(*group.shape, *group.shape)
        yield index, np.einsum("iojo->ij", block), np.einsum("ioiq->oq", block)


MATRICES = {"w": PLACES["w"], "e": PLACES["e"].T, "v": PLACES["v"]}
"""The places of weights, with inputs as rows and outputs as columns."""


def added(terms, weight, leaves):
    """The sum of the terms on some leaves, by blocks of leaves with factors and diagonals of others, without the identity."""
    total = np.zeros((SIZE, SIZE))
    for term in terms:
        if shift_of([term]) == 0:
            known = [name for name in (weight, term.layers[weight]) if name] if weight in term.layers else []
            loose = [name for name in leaves if name not in known]
            total += masked(term.dense, known) + masked(np.diag(np.diag(term.dense)), loose)
    return total


def by_definition(terms):
    """The Kronecker and the eigen-Kronecker view of a sum, as `jaxfisher.kronecker` defines them, without the library."""
    identity = shift_of(terms) * np.eye(SIZE)
    dense = sum(term.dense for term in terms)
    kronecker, eigen, covered = identity.copy(), np.zeros_like(identity), set()
    for weight, matrix in MATRICES.items():
        uses = [term.layers[weight] for term in terms if weight in term.layers]
        if uses:
            bias = next((bias for bias in uses if bias), None)
            places = (matrix if bias is None else np.vstack([matrix, PLACES[bias]]))[None]
            summed = added(terms, weight, [weight, bias] if bias else [weight])
            kronecker, eigen = kronecker + product(summed, places), eigen + rotated(dense, summed, places)
            covered |= {weight, bias}
    uses = list({term.stack: None for term in terms if "u" in term.layers})
    layouts = {True: PLACES["u"], False: PLACES["u"].reshape(1, 4, 2)}
    if uses:
        # Factors in two layouts remain two terms; the eigenvectors are those of the first.
        parts = {flag: [term for term in terms if "u" not in term.layers or term.stack == flag] for flag in uses}
        rest = added([term for term in terms if "u" not in term.layers], "u", "u")
        made = {flag: added(part, "u", "u") - (len(uses) - 1) * rest for flag, part in parts.items()}
        kronecker += sum(product(matrix, layouts[flag]) for flag, matrix in made.items()) + (len(uses) - 1) * rest
        eigen += rotated(dense, made[uses[0]], layouts[uses[0]])
        covered.add("u")
    others = [[name for name in SHAPES if name not in covered]]
    return (
        kronecker + np.diag(np.diag(masked(dense - identity, *others))),
        eigen + np.diag(np.diag(masked(dense, *others))),
    )


@pytest.mark.parametrize("names", SUMS, ids=" + ".join)
def test_every_view_of_a_sum_is_what_its_definition_says(names):
    """Exact views are those of the dense sum; Kronecker views merge factors and have the trace of the sum on every leaf."""
    made, parts = views(names), terms_of(names)
    dense = sum(term.dense for term in parts)
    assert_close(made["dense"], dense)
    assert_close(made["diagonal"], np.diag(np.diag(dense)))
    assert_close(made["blocks"], masked(dense, "bw", "ce", "stu", "v"))
    # A multiple of the identity, such as a prior, is kept in every direction, beside the eigenpairs of the rest.
    prior = ("identity" in names) * 0.3 * np.eye(SIZE)
    assert_close(made["low rank"], truncated(dense - prior, EIGENPAIRS) + prior, factor=1e4)
    parts = terms_of(names, without=["centred"])
    kronecker, eigen = by_definition(parts)
    assert_close(made["expand"], kronecker, factor=1e4)
    assert_close(made["eigen"], eigen, factor=1e4)
    traces = np.diag(made["expand"] - sum(term.dense for term in parts))
    for places in PLACES.values():
        assert abs(np.sum(traces[places])) < 1e-12 * np.trace(dense)


# Sums whose Kronecker views are exact.


def exact(mean, x, scale=1.0):
    return jf.exact_fisher(normal(mean, scale))(PARAMS, x)


def test_a_view_is_the_sum_where_that_has_factors():
    """The view is exact for the sum over two heads, over scales of one layer's outputs or inputs, and with a prior."""
    x = numbers(0, 6, 3)
    heads = [lambda p, x, name=name: x @ p[name] for name in ("w", "v")]
    wide = jnp.asarray([1.0, -2.0, 3.0])

    def make():
        one, two = (exact(head, x, scale) for head, scale in zip(heads, (0.3, 2.0), strict=True))
        sums = {
            "two heads": one + two,
            "of other weight": 100.0 * one + two,
            "other scales": exact(layered, x, 0.5) + 3.0 * exact(layered, x, 2.0),
            "other inputs": 2.0 * exact(bare, x) + 3.0 * exact(bare, wide[None] * x),
            "a prior": exact(layered, x) + jf.scaled_identity(PARAMS, 0.3) + jf.scaled_identity(PARAMS, 0.1),
        }
        return {
            name: (jf.block_diagonal(total, jf.layers(total)).as_matrix(), [view(total).as_matrix() for view in KRONECKER])
            for name, total in sums.items()
        }

    for name, (blocks, made) in traced(make)().items():
        for matrix in made:
            assert np.linalg.norm(matrix - blocks) < 1e-12 * np.linalg.norm(blocks), name


KRONECKER = (jf.kronecker, jf.kronecker_reduce, jf.eigen_kronecker)


def test_merging_does_not_depend_on_the_order():
    terms = [fisher_of("held"), 100.0 * fisher_of("streamed"), jf.diagonal(fisher_of("alone")), fisher_of("other")]

    def make(terms):
        orders = [terms, terms[::-1], [terms[0], jf.kronecker(terms[1] + terms[2]), terms[3]]]
        return [jf.kronecker(functools.reduce(lambda a, b: a + b, order)).as_matrix() for order in orders]

    first, *others = traced(make)(terms)
    for other in others:
        assert_close(other, first)


def test_the_basis_of_another_operator():
    """In the eigenvectors of another operator any operator has its own second moments, even a covariance of scores."""
    operators = {name: forms()[name] for name in ("centred", "dense", "joined", "low rank", "sum")}

    def make(operators):
        basis = jf.kronecker(fisher_of("held") + jf.scaled_identity(PARAMS, 0.7))
        return {name: jf.eigen_kronecker(operator, basis).as_matrix() for name, operator in operators.items()}

    held = term_of("held").dense
    for name, matrix in traced(make)(operators).items():
        dense, expected = sum(term.dense for term in terms()[name]), np.zeros((SIZE, SIZE))
        for places in (np.vstack([PLACES["w"], PLACES["b"]]), np.vstack([PLACES["e"].T, PLACES["c"]])):
            expected += rotated(dense, held, places[None])
        others = masked(dense, "stuv")
        assert_close(matrix, expected + np.diag(np.diag(others)), factor=1e4)


# Uses of such views: solves, running means, optimisers.


def interior(p, x):
    """The second derivative of a network by its input, which uses the weights several times and without their biases."""
    return jax.grad(jax.grad(lambda z: network(p, jnp.atleast_1d(z))[0]))(x[0])[None]


def network(p, x):
    return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


NETWORK = {"w1": numbers(1, 1, 6), "b1": numbers(2, 6), "w2": numbers(3, 6, 1), "b2": numbers(4, 1)}


def test_an_equation_is_solved_with_its_boundary_and_a_prior():
    """u'' = -pi^2 sin(pi x) with u = 0 at both ends: `kfac` on the sum of two Fishers and a weight decay."""
    inside, ends = jnp.linspace(0.1, 0.9, 9)[:, None], jnp.array([[0.0], [1.0]])
    outputs = [lambda p, x, f=f: jf.Normal(f(p, x), jnp.ones(1)) for f in (interior, network)]

    def fisher(params):
        terms = [jf.exact_fisher(model)(params, x) for model, x in zip(outputs, (inside, ends), strict=True)]
        return terms[0] + 10.0 * terms[1] + jf.scaled_identity(params, 1e-3)

    def loss(params):
        right = jnp.square(jax.vmap(interior, (None, 0))(params, inside) + jnp.pi**2 * jnp.sin(jnp.pi * inside))
        return 0.5 * jnp.mean(right) + 5 * jnp.mean(jnp.square(jax.vmap(network, (None, 0))(params, ends)))

    opt = jf.kfac(like=lambda: fisher(NETWORK))

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        made = {"fisher": fisher(params), "value": value, "grad": gradient, "value_fn": loss}
        updates, state = opt.update(gradient, state, params, **made)
        return (optax.apply_updates(params, updates), state), value

    (params, _), values = traced(lambda start: jax.lax.scan(step, start, length=60))((NETWORK, opt.init(NETWORK)))
    assert values[0] > 10 and loss(params) < 0.05


def test_solves_running_means_and_factored_damping_of_a_shifted_view():
    fisher, prior = fisher_of("held"), 0.3
    v = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), PARAMS)
    decayed = jf.scale_by_fisher(0.1, view=jf.kronecker, decay=0.5, update_every=2, like=lambda: total())
    total = lambda: fisher + jf.scaled_identity(PARAMS, prior)  # noqa: E731

    def make(fisher):
        view, bare = jf.kronecker(total()), jf.kronecker(fisher)
        updates, _ = decayed.update(v, decayed.init(PARAMS), fisher=total)
        found = {
            "exact": (view.solve(v, 0.1), bare.solve(v, 0.1 + prior)),
            "averaged": (updates, bare.solve(v, 0.1 + prior)),
        }
        factored = [jf.solve(F, v, d, jf.factored_solve)[0] for F, d in ((view, 0.1), (bare, 0.1 + prior))]
        added = jf.solve(bare + jf.scaled_identity(bare, prior), v, 0.1, jf.factored_solve)[0]
        return found | {"factored": factored, "factored, a prior added to the view": (added, factored[1])}

    for name, (made, expected) in traced(make)(fisher).items():
        assert_close(flat(made), flat(expected), factor=1e3), name


# Errors.


def test_views_by_layers_need_factors():
    held, centred = fisher_of("held"), forms()["centred"]
    without = (jf.dense(held), jf.dense(held) + jf.diagonal(held), jf.scaled_identity(held, 1.0))
    for view in (*KRONECKER, jf.layers):
        for operator in without:
            with pytest.raises(TypeError, match=r"not held as scores"):
                view(operator)
    for view in KRONECKER:
        for operator in (centred, held + centred):
            with pytest.raises(TypeError, match=r"covariance of scores.*jf\.eigen_kronecker\(fisher, basis\)"):
                view(operator)
