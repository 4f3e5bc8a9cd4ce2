"""The library's scores of a random program against ``vmap(grad)``, leaf by leaf and quantity by quantity."""

import dataclasses
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import jaxfisher as jf
from programs.evaluate import evaluate, evaluated
from programs.writer import EXAMPLES

WEIGHTS = np.array([0.4, 1.0, 2.5, 0.7, 1.6])
PADDING = 2
"""The number of padding examples, of NaN and of nonsense, with a weight of zero."""
PIECE = 2
"""The batch size of streamed scores, which does not divide the number of examples."""
DIGITS = {2.2e-16: 1e4, 1.2e-7: 300.0, 9.8e-4: 20.0, 7.8e-3: 10.0}
"""By how many eps of the least precise dtype two orders of rounding may differ, beside the effect of rounded inputs."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault: its kind (``crashed`` or ``wrong``), where it is, and how it shows."""

    kind: str
    where: str
    detail: str

    def __str__(self):
        return f"{self.kind} {self.where}: {self.detail}"


class Skipped(Exception):
    """JAX itself cannot differentiate the program, or its gradients are not finite or are huge."""


def compare(program, draw=0, ways=None):
    """The faults of the library on this program, an empty list if there are none. Raises `Skipped`."""
    params, data = program.params(draw), program.examples(draw)
    exact = _Exact(program, params, data)
    rng = np.random.default_rng((program.seed, draw, 2))
    # Scale the vector so that every leaf matters in the products, however small its gradients are.
    v = {
        name: jnp.asarray(rng.standard_normal(leaf.shape) / (exact.size(name) or 1), exact.dtype)
        for name, leaf in params.items()
    }
    u = rng.standard_normal(EXAMPLES)
    faults = []
    for way in ways or ways_of(program.seed):
        faults += _faults_of(way, program.log_prob, params, data, v, u, exact, program.seed)
    return faults


def ways_of(seed):
    """One of the ways in turn, since a fault in a program's factors shows in any of them."""
    return (WAYS[seed % len(WAYS)],)


class _Exact:
    """Per-example gradients by ``vmap(grad)``, and how far they move when the inputs are rounded."""

    def __init__(self, program, params, data):
        plain = jax.vmap(jax.grad(program.log_prob), (None, 0, 0, 0))
        try:
            traced = jax.make_jaxpr(plain)(params, *data)
        except Exception as error:
            raise Skipped(f"vmap(grad) raises {type(error).__name__}") from error
        digits = min(DIGITS, key=lambda eps: abs(np.log(eps / program.eps)))

        def leaves(change):
            rng = np.random.default_rng(7)
            moved = [np.asarray(x) for x in jax.tree.leaves((params, data))]
            moved = [
                (x * (1 + change * rng.choice([-1, 1], x.shape))).astype(x.dtype) if np.issubdtype(x.dtype, np.floating) else x
                for x in moved
            ]
            made = evaluate(traced, *(jnp.asarray(x) for x in moved))
            return dict(zip(sorted(params), (np.asarray(x, np.float64).reshape(EXAMPLES, -1) for x in made), strict=True))

        self.rows = leaves(0.0)
        if not all(np.all(np.isfinite(rows)) for rows in self.rows.values()):
            raise Skipped("not finite")
        if max(np.abs(rows).max(initial=0) for rows in self.rows.values()) > 1e6:
            raise Skipped("huge")
        self.dtype = jnp.float64 if any(leaf.dtype == jnp.float64 for leaf in params.values()) else jnp.float32
        eps = max(program.eps, float(jnp.finfo(self.dtype).eps))
        largest = max(np.abs(rows).max(initial=0) for rows in self.rows.values())
        noise = [leaves(sign * 2 * eps) for sign in (1, -1)]
        self.within = {
            name: DIGITS[digits] * eps * np.abs(rows).max(initial=0)
            + 30 * max(np.nanmax(np.abs(moved[name] - rows), initial=0) for moved in noise)
            + 10 * eps * largest
            for name, rows in self.rows.items()
        }

    def size(self, name):
        return float(np.abs(self.rows[name]).max(initial=0))


def _faults_of(way, log_prob, params, data, v, u, exact, seed):
    scores, weights = _MAKERS[way](log_prob), np.full(EXAMPLES, 1 / EXAMPLES)
    keywords = {}
    if way in ("padded", "centred", "streamed and centred"):
        weights, keywords = WEIGHTS / WEIGHTS.sum(), {"weights": jnp.asarray(WEIGHTS)}
    if way == "padded":
        data = jax.tree.map(_padded, data)
        keywords["weights"] = jnp.asarray([*WEIGHTS, *(0.0,) * PADDING])
        u = np.array([*u, *(0.0,) * PADDING])
    if way == "kronecker":
        return _faults_of_factors(log_prob, params, data, exact)
    quantities = list(_QUANTITIES)
    if way.startswith("streamed"):
        # Each quantity recomputes the scores, which is most of the work, so each program checks only some quantities.
        quantities = np.random.default_rng(seed).permutation(quantities)[:SOME]

    def run(params, data, v, u, keywords):
        made = scores(params, *data, **keywords)
        return {quantity: _QUANTITIES[quantity](made, v, u) for quantity in quantities}

    try:
        made = evaluated(run, params, data, v, jnp.asarray(u, exact.dtype), keywords)
    except Exception as error:
        return [Fault("crashed", way, _said(error))]
    return list(_differences(way, made, exact, _flat(v), u[:EXAMPLES], weights, "centred" in way))


_QUANTITIES = {
    "as_matrix": lambda scores, v, u: scores.as_matrix(),
    "gram": lambda scores, v, u: scores.gram(),
    "mv": lambda scores, v, u: scores.mv(v),
    "rmv": lambda scores, v, u: ravel_pytree(scores.rmv(u))[0],
    "squared_norms": lambda scores, v, u: scores.squared_norms(),
    "diagonal": lambda scores, v, u: ravel_pytree(scores.diagonal())[0],
    "second_moment": lambda scores, v, u: scores.second_moment(),
}
SOME = 3
"""The number of quantities that are checked for a program's streamed scores."""
_MAKERS = {
    "held": jf.scores,
    "padded": jf.scores,
    "streamed": lambda log_prob: jf.scores(log_prob, batch_size=PIECE),
    "centred": lambda log_prob: jf.scores(log_prob, center=True),
    "streamed and centred": lambda log_prob: jf.scores(log_prob, center=True, batch_size=PIECE),
    "kronecker": jf.empirical_fisher,
}
WAYS = tuple(_MAKERS)


def _padded(array):
    nonsense = jnp.nan if jnp.issubdtype(array.dtype, jnp.floating) else -(10**6)
    return jnp.concatenate([array, jnp.full((PADDING, *array.shape[1:]), nonsense, array.dtype)])


def _flat(tree):
    return np.concatenate([np.asarray(tree[name], np.float64).reshape(-1) for name in sorted(tree)])


def _said(error):
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "jaxfisher/" in frame.filename]
    place = f" ({frames[-1].filename.split('jaxfisher/')[-1]}: {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0][:200]}{place}"


def _differences(way, made, exact, v, u, weights, centred):
    """A fault for each quantity that is off."""
    names = sorted(exact.rows)
    rows = np.concatenate([exact.rows[name] for name in names], axis=1)
    column = np.concatenate([np.full(exact.rows[name].shape[1], exact.within[name]) for name in names])
    largest = np.concatenate([np.full(exact.rows[name].shape[1], exact.size(name)) for name in names])
    if centred:
        rows, column = rows - weights @ rows, 2 * column
    # The error of a product that the errors allowed in its entries can cause.
    pair = 2 * np.sum(column * largest) + np.sum(column**2)
    wanted = {
        "as_matrix": (rows, column),
        "gram": (rows @ rows.T, pair),
        "mv": (rows @ v, np.abs(v) @ column),
        "rmv": (rows.T @ u, np.sum(np.abs(u)) * column),
        "squared_norms": (np.sum(rows**2, axis=1), pair),
        "diagonal": (weights @ rows**2, 2 * column * largest + column**2),
        "second_moment": (
            rows.T @ (weights[:, None] * rows),
            column[:, None] * largest + largest[:, None] * column + column[:, None] * column,
        ),
    }
    owner = np.repeat(names, [exact.rows[name].shape[1] for name in names])
    for quantity, (expected, within) in ((name, wanted[name]) for name in made):
        found = np.asarray(made[quantity], np.float64)
        if quantity in ("as_matrix", "mv", "squared_norms"):
            found = found[:EXAMPLES]
        if quantity == "gram":
            found = found[:EXAMPLES, :EXAMPLES]
        yield from _off(way, quantity, found, expected, within, owner)


def _off(way, quantity, found, expected, within, owner):
    if found.shape != expected.shape:
        yield Fault("wrong", f"{way} {quantity}", f"shape {found.shape}, expected {expected.shape}")
        return
    off = np.abs(found - expected) - within
    if np.all(off <= 0):
        return
    worst = np.nanmax(np.abs(found - expected)) / (np.max(np.abs(expected)) or 1) if np.any(np.isfinite(found)) else np.inf
    columns = np.any(~(off <= 0), axis=0) if off.ndim == 2 else ~(off <= 0)
    leaves = sorted(set(owner[columns])) if len(columns) == len(owner) else []
    of = f" of {', '.join(leaves)}" if leaves else ""
    number = "" if np.all(np.isfinite(found)) else ", not finite"
    yield Fault("wrong", f"{way} {quantity}{of}", f"off by {100 * worst:.3g} % of its largest{number}")


def _faults_of_factors(log_prob, params, data, exact):
    """Kronecker blocks are exact on the diagonal for one example of a leaf without sharing; EKFAC has the trace for any."""
    first = jax.tree.map(lambda array: array[:1], data)

    def run(params, data, first):
        one = jf.kronecker(jf.empirical_fisher(log_prob)(params, *first))
        fisher = jf.empirical_fisher(log_prob)(params, *data)
        return one.diagonal(), jf.eigen_kronecker(fisher).trace()

    try:
        leaves = {leaf.path: leaf for leaf in jf.explain(log_prob)(params, *data).leaves}
        diagonal, trace = evaluated(run, params, data, first)
    except Exception as error:
        return [Fault("crashed", "kronecker", _said(error))]
    faults = []
    for name, rows in exact.rows.items():
        leaf = leaves[f"['{name}']"]
        layer = leaves[leaf.kronecker.removeprefix("with ")] if leaf.kronecker.startswith("with ") else leaf
        if leaf.kronecker.startswith("no") or layer.positions == 1:
            within = 2 * exact.within[name] * exact.size(name) + exact.within[name] ** 2
            found = np.asarray(diagonal[name], np.float64).reshape(-1)
            faults += _off("kronecker", f"diagonal of {name}", found, rows[0] ** 2, within, np.empty(0))
    total = sum(np.mean(np.sum(rows**2, axis=1)) for rows in exact.rows.values())
    within = sum(2 * exact.within[name] * exact.size(name) * rows.shape[1] for name, rows in exact.rows.items())
    return [
        *faults,
        *_off("kronecker", "EKFAC trace", np.atleast_1d(np.asarray(trace, float)), np.atleast_1d(total), within, np.empty(0)),
    ]
