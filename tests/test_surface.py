"""The combinations of public features as a grid: each cell works, or raises an error of ours that a table lists.

A cell is a Fisher (or scores, a natural gradient, an explanation) for a model with no input, one, several or a pytree; a
family; a mode (held, in pieces, weighted, centred); a view; and a transformation (none, `jit`, `vmap`). Cells are evaluated
abstractly, so nothing is compiled. For each Fisher the grid has every pair of inputs, mode and transformation, and every triple
with ``WHOLE_SURFACE=1`` in the environment, which takes some three times as long. Families and views rotate through these
cells, and have grids of their own besides.
"""

import inspect
import itertools
import os
import pathlib
import re
import traceback
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from models import HEADS

import jaxfisher as jf

N = 5
PACKAGE = str(pathlib.Path(jf.__file__).parent)
FAMILIES = {head.name: head for head in HEADS}
INPUTS = {
    "none": (),
    "one": ((2,),),
    "several": ((2,), ()),
    "pytree": ({"x": (2,), "rest": [(), (2, 1)]},),
}
MODES = {
    "held": {},
    "in pieces": {"batch_size": 2},
    "in bytes": {"max_bytes": 2**17},
    "weighted": {},
    "centred": {"center": True},
    "weighted in pieces": {"batch_size": 2},
}
TRANSFORMS = ("plain", "jit", "vmap over parameters", "vmap over data")


def raw(params, *inputs):
    """The numbers that a head turns into a distribution, linear in all inputs."""
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(inputs)]) if inputs else jnp.zeros(0)
    return flat @ params["weight"] + params["bias"] if inputs else params["bias"]


class Given(NamedTuple):
    """The shapes of all arguments that a maker may need."""

    params: object
    data: tuple
    target: object
    key: object
    weights: object


def given(cell):
    """The shapes of a cell's parameters, data, target, key and weights."""
    head, inputs = FAMILIES[cell.family], INPUTS[cell.inputs]
    outputs = len(head.centre)
    is_shape = lambda leaf: isinstance(leaf, tuple) and all(isinstance(size, int) for size in leaf)  # noqa: E731
    shapes = [jax.tree.map(lambda shape: jax.ShapeDtypeStruct((N, *shape), float), tree, is_leaf=is_shape) for tree in inputs]
    count = sum(leaf.size // N for leaf in jax.tree.leaves(shapes))
    params = {"bias": jax.ShapeDtypeStruct((outputs,), float)}
    if inputs:
        params["weight"] = jax.ShapeDtypeStruct((count, outputs), float)
    target = jax.eval_shape(lambda raw: head.predict(raw).sample(jax.random.key(0), (N,)), params["bias"])
    key = jax.eval_shape(lambda: jax.random.key(0))
    weights = jax.ShapeDtypeStruct((N,), float) if cell.mode.startswith("weighted") else None
    return Given(params, tuple(shapes), target, key, weights)


class Cell(NamedTuple):
    """One cell of the grid."""

    kind: str
    inputs: str
    family: str
    mode: str
    transform: str
    view: str = ""


def of_log_prob(maker):
    """A maker whose function takes a log-density, the parameters and the data with the target."""
    return maker, lambda model, given, options: maker(jf.log_likelihood(model), **options)(
        given.params, *given.data, given.target, weights=given.weights
    )


def of_model(maker, *, key=False):
    """A maker whose function takes a model, the parameters and the inputs."""
    return maker, lambda model, given, options: maker(model, **options)(
        given.params, *((given.key,) if key else ()), *given.data, weights=given.weights
    )


def of_fisher(maker):
    """A natural gradient along the exact Fisher."""

    def make(model, given, options):
        fisher = lambda params, *data, weights=None: jf.exact_fisher(model)(params, *data[:-1], weights=weights)  # noqa: E731
        step = maker(jf.log_likelihood(model), fisher, damping=0.1, **options)
        return step(given.params, *given.data, given.target, weights=given.weights)

    return maker, make


FISHERS = {
    "empirical_fisher": of_log_prob(jf.empirical_fisher),
    "exact_fisher": of_model(jf.exact_fisher),
    "sampled_fisher": of_model(jf.sampled_fisher, key=True),
    "implicit_fisher": of_model(jf.implicit_fisher),
    "kl_hessian": of_model(jf.kl_hessian),
    "observed_information": of_log_prob(jf.observed_information),
}


def explained(model, given, options):
    """An explanation, which is no pytree of arrays: only the number of its leaves is checked."""
    made = jf.explain(jf.log_likelihood(model))(given.params, *given.data, given.target)
    assert len(made.leaves) == len(jax.tree.leaves(given.params))
    return ()


def natural(maker):
    """A natural gradient along the empirical Fisher."""
    damped = lambda log_prob, **options: maker(log_prob, damping=0.1, **options)  # noqa: E731
    return maker, of_log_prob(damped)[1]


KINDS = {
    **FISHERS,
    "scores": of_log_prob(jf.scores),
    # `natural_grad` is the second result of `value_and_natural_grad`, so its cells are those of both.
    "natural_grad": natural(jf.natural_grad),
    "natural_grad of exact": of_fisher(jf.natural_grad),
    "explain": (jf.explain, explained),
}
VIEWS = {
    "dense": jf.dense,
    "diagonal": jf.diagonal,
    "block_diagonal": jf.block_diagonal,
    "kronecker": jf.kronecker,
    "kronecker_reduce": jf.kronecker_reduce,
    "eigen_kronecker": jf.eigen_kronecker,
    "low_rank": lambda fisher: jf.low_rank(fisher, 1),
    "nystrom": lambda fisher: jf.nystrom(fisher, jax.random.key(0), 1),
    "partial_cholesky": lambda fisher: jf.partial_cholesky(fisher, 1),
}


class Refusal(NamedTuple):
    """A pattern of cells that must raise an error of ours, and a pattern of its message."""

    message: str
    kind: str = ".*"
    inputs: str = ".*"
    mode: str = ".*"
    transform: str = ".*"
    view: str = ".*"

    def covers(self, cell):
        """Whether the pattern matches this cell."""
        return all(re.fullmatch(getattr(self, name), getattr(cell, name)) for name in self._fields[1:])


REFUSALS = (
    # An unconditional model without data is one example, and has one weight.
    Refusal(
        "`weights` has shape .* but there are 1 examples",
        kind="(exact|sampled|implicit)_fisher|kl_hessian",
        inputs="none",
        mode="weighted.*",
    ),
    Refusal("`weights` has shape .* but there are 1 examples", kind="natural_grad of exact", inputs="none", mode="weighted.*"),
    Refusal("is a covariance of scores", kind="empirical_fisher", mode="centred", view=".*kronecker.*"),
    Refusal("is not held as scores", kind="kl_hessian|observed_information", view=".*kronecker.*"),
    Refusal("`max_bytes` is given with a `fisher`", kind="natural_grad of exact", mode="in bytes"),
)


def there_is(cell):
    """Whether the cell exists: the maker has the options of its mode, and there is something to map over."""
    maker, _ = KINDS[cell.kind]
    known = inspect.signature(maker).parameters
    if not set(MODES[cell.mode]) <= set(known):
        return False
    if cell.kind == "explain" and cell.mode != "held":
        return False
    mapped = given(cell).data if cell.kind in FISHERS and FISHERS[cell.kind][1] else True
    return not (cell.transform == "vmap over data" and not jax.tree.leaves((mapped, cell.mode.startswith("weighted") or None)))


def looked_at(value):
    """Some numbers of the value that a maker or a view returned."""
    if isinstance(value, jf.Scores):
        return value.squared_norms()
    return value.diagonal() if isinstance(value, jf.Operator) else value


def outcomes(cell, views):
    """For a cell without a view and with each of these views: the exception that it raised, or None."""
    _, make = KINDS[cell.kind]
    head, options = FAMILIES[cell.family], MODES[cell.mode]
    model = lambda params, *inputs: head.predict(raw(params, *inputs))  # noqa: E731
    found = {}

    def tried(view, function):
        try:
            result = function()
        except Exception as error:
            found[view] = error
            return ()
        found[view] = None
        return result

    def run(params, data, target, key, weights):
        with_all = Given(params, data, target, key, weights)
        making = jax.jit(lambda with_all: make(model, with_all, options)) if cell.transform == "jit" else None
        made = tried("", lambda: making(with_all) if making else make(model, with_all, options))
        if found[""] is not None:
            return ()
        seen = [tried("", lambda: looked_at(made))]
        return seen + [tried(view, lambda view=view: looked_at(VIEWS[view](made))) for view in views]

    shapes = given(cell)
    axes = {"vmap over parameters": (0, None, None, None, None), "vmap over data": (None, 0, 0, None, 0)}.get(cell.transform)
    if axes is not None:
        widen = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), tree)  # noqa: E731
        shapes = [widen(tree) if axis == 0 else tree for tree, axis in zip(shapes, axes, strict=True)]
        run = jax.vmap(run, axes)
    try:
        jax.eval_shape(run, *shapes)
    except Exception as error:
        found[""] = error
    return {cell._replace(view=view): outcome for view, outcome in found.items()}


def is_ours(error):
    """Whether an error is one of the three types that we raise on purpose, raised by a line of the package."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError | TypeError | NotImplementedError) and frames[-1].filename.startswith(PACKAGE)


def wrong(cell, error):
    """What is wrong with an outcome, or None."""
    expected = [refusal for refusal in REFUSALS if refusal.covers(cell)]
    if error is None:
        return f"{cell} works, and the table says that it raises {expected[0].message!r}" if expected else None
    said = f"{type(error).__name__}: {str(error)[:300]}"
    if not is_ours(error):
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(PACKAGE)]
        at = f"{frames[-1].filename[len(PACKAGE) :]}:{frames[-1].lineno}" if frames else "outside"
        return f"{cell} raises an error that is not ours, {said} ({at})"
    if not any(re.search(refusal.message, str(error)) for refusal in expected):
        return f"{cell} raises what the table does not name, {said}"
    return None


WHOLE = os.environ.get("WHOLE_SURFACE") == "1"
QUICK = ("Normal", "Bernoulli", "Categorical", "Exponential", "MultivariateNormal")
"""Families that are traced quickly. The others use special functions."""


def grid(kind):
    """The cells of a kind, each with the views that are tried on it."""
    families, views = itertools.cycle(QUICK), itertools.cycle(VIEWS)
    triples = itertools.product(*map(enumerate, (INPUTS, MODES, TRANSFORMS)))
    cells = {
        Cell(kind, inputs, next(families), mode, transform): (next(views),)
        # Triples whose places add up to a multiple of four contain every pair.
        for (i, inputs), (j, mode), (k, transform) in triples
        if WHOLE or (i + j + k) % len(TRANSFORMS) == 0
    }
    cells |= {Cell(kind, inputs, next(families), "held", "plain"): tuple(VIEWS) for inputs in INPUTS}
    places = (("one", "held"), ("none", "held"), ("one", "in pieces"))
    # A natural gradient uses a family only through scores and Fishers, which have cells of their own. The Hessian of each
    # family's divergence takes the longest to trace, and tests/test_identities.py compares it with the Fisher.
    elsewhere = "natural_grad" in kind or kind == "kl_hessian"
    for i, family in enumerate(() if elsewhere and not WHOLE else FAMILIES):
        cells |= {Cell(kind, inputs, family, mode, "plain"): () for inputs, mode in (places if WHOLE else places[i % 3 :][:1])}
    return {cell: views if kind in FISHERS else () for cell, views in cells.items() if there_is(cell)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_cell_works_or_says_why_not(kind):
    found = {}
    for cell, views in grid(kind).items():
        found |= outcomes(cell, views)
    failures = [text for cell, error in found.items() if (text := wrong(cell, error))]
    for refusal in REFUSALS:
        assert any(refusal.covers(cell) for cell in found) == bool(re.fullmatch(refusal.kind, kind)), refusal
    assert not failures, f"{len(failures)} of {len(found)}:\n" + "\n".join(failures)
