"""The laws that every operator, solver and distribution must satisfy, checked for a new one, with a verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray

from jaxfisher._check_fisher import check_fisher
from jaxfisher._distributions.base import Distribution
from jaxfisher._distributions.joint import Joint
from jaxfisher._operators.form import Form
from jaxfisher._operators.operator import Operator, Solver
from jaxfisher._provenance import Provenance
from jaxfisher._readings import Around
from jaxfisher._stack import refuse_stack
from jaxfisher._tree import as_key, described
from jaxfisher._values import nonnegative
from jaxfisher._verdict import Check, Verdict

Z = 5
"""The tolerance in standard errors: one false alarm in two million normal numbers."""
DRAWS = 20_000
RANK = 1e-9
"""Eigenvalues of a matrix in float64 below this share of the largest count as zero in any dtype."""
POWERS = np.array([0.5, -0.5, 1.5])
"""The powers that are checked: the two roots of a damped operator (`sqrt_mv`, `inv_sqrt_mv`), and one without damping."""


class LawCheck(Verdict):
    """Whether the laws of an operator or of a distribution hold; ``print`` it for a table.

    Where arrays are compared, the number found is the largest difference, in units of the largest expected number.

    Attributes:
        checks: one entry for each law.
        notes: why a law could not be decided.
    """


def check_laws(
    member: Operator | Distribution,
    *,
    key: PRNGKeyArray,
    matrix: np.ndarray | None = None,
    solver: Solver | None = None,
    rounding: float | None = None,
) -> LawCheck:
    r"""Check whether a new form, view, solver or family obeys the laws that the library's own obey.

    For an operator every number is compared with that of its dense matrix in float64 by NumPy, for a damping ``d`` of a tenth
    of the mean eigenvalue and for one damping per leaf:

    .. math:: F v, \; v^T F v, \; (F + d I)^{-1} v, \; (F + d I)^{\pm 1/2} v, \; F^{3/2} v, \; \log\det(F + d I), \;
        \operatorname{diag} F, \; \operatorname{tr} F, \; \lambda(F), \; \operatorname{rank} F, \; \|F\|.

    The operator must be linear, symmetric and positive semi-definite, give the same products under ``vmap``, and be rebuilt
    from its leaves. To check a view, pass the operator that it returns; to check a solver, pass an operator and ``solver``.

    For a distribution ``p``, a batch of at least two, draws must have its mean and its variance, ``KL(p || q)`` must be the
    mean of ``log p - log q`` over draws for its neighbour q in the batch, the entropy must be the mean of ``-log p``, no draw
    may be more probable than the mode, and the batch must equal its members. Its Fisher, KL, density and draws must agree in
    the sense of `check_fisher`.

    Args:
        member: an operator of moderate size, or a distribution with a batch shape.
        key: a random key, for vectors and draws.
        matrix: the dense matrix ``[p, p]`` that the operator must equal, in `jax.flatten_util.ravel_pytree` order; by default
            the matrix of the operator's own products.
        solver: a solver to check as well, against the residual that it reports.
        rounding: the relative rounding error of the operator's numbers; by default the eps of its dtype.

    Returns:
        A `LawCheck`; ``print`` it for a table, and test ``.passed``. The tolerances are multiples of ``rounding`` or, for
        draws, five standard errors. A law that cannot be decided, such as that of one damping per leaf for a form that refuses
        it, is no failure, and a note says so.

    Raises:
        TypeError: ``member`` is neither an operator nor a distribution, or is a `Joint`, whose parts have the laws; ``key`` is
            no random key; ``matrix``, ``solver`` or ``rounding`` with a distribution.
        ValueError: a distribution without a batch of two or more; a matrix of another shape; an operator that would have to
            make a matrix for p above 4096.

    Reference: Golub and Van Loan, Matrix Computations (4th ed., 2013), section 2.7, for rounding errors; Amari, Information
    Geometry and Its Applications (2016), section 1.3, for the Fisher of a divergence.

    >>> import jax, jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.exact_fisher(lambda w, x: jf.Normal(x @ w, 1.0))(jnp.zeros(2), jnp.array([[2.0, 0.0], [2.0, 2.0]]))
    >>> jf.check_laws(jf.dense(F), key=jax.random.key(0))
    LawCheck(passed)
    >>> jf.check_laws(jf.Poisson(log_rate=jnp.array([0.5, 1.0])), key=jax.random.key(0))
    LawCheck(passed)
    """
    key = as_key(key, "check_laws")
    if isinstance(member, Distribution):
        if matrix is not None or solver is not None or rounding is not None:
            raise TypeError("check_laws: `matrix`, `solver` and `rounding` are for operators, and this is a distribution.")
        return _of_distribution(member, key)
    if not isinstance(member, Operator):
        raise TypeError(
            f"check_laws: expected an operator or a distribution, got {described(member)}. For a view, pass what it returns; "
            "for a solver, pass an operator and solver=...; for a model, use jf.check_fisher."
        )
    refuse_stack(member.form.stack, "Operator", "check_laws")
    if matrix is not None and np.shape(matrix) != member.shape:
        raise ValueError(f"check_laws: `matrix` has shape {np.shape(matrix)}; expected {member.shape}, that of the operator.")
    eps = float(jnp.finfo(member.spec.dtype).eps) if rounding is None else float(nonnegative("rounding", rounding, jnp.float32))
    return _of_operator(member, key, matrix, solver, eps)


# --- operators -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Compared:
    """A found and an expected array, and how many roundings of the largest expected number they may be apart."""

    name: str
    found: Any
    expected: Any
    factor: float

    def check(self, rounding: float) -> Check:
        found, expected = np.asarray(self.found, np.float64), np.asarray(self.expected, np.float64)
        if found.shape != expected.shape:
            return Check(f"{self.name}: shape", found.ndim, expected.ndim, 0.0, False)
        apart = np.max(np.abs(found - expected), initial=0.0) / (np.max(np.abs(expected), initial=0.0) or 1.0)
        within = self.factor * rounding
        return Check(self.name, float(apart), 0.0, within, bool(apart <= within))


def _of_operator(F: Operator, key: Array, matrix: Any, solver: Solver | None, rounding: float) -> LawCheck:
    v, w = (F.spec.unravel(jax.random.normal(k, (F.size,), F.spec.dtype)) for k in jax.random.split(key))
    dense = np.asarray(_columns(F.form) if matrix is None else matrix, np.float64)
    damping = 0.1 * np.trace(dense) / F.size or 1.0
    dampings = [damping * (1 + i / 2) for i in range(len(F.spec.sizes))]
    seen = jax.tree.map(np.asarray, _numbers(F.form, v, w, jnp.asarray(damping, F.spec.dtype)))
    compared = [*_dense_laws(seen, np.asarray(_flat(v), np.float64), dense, damping)]
    pair = np.stack([np.asarray(_flat(vector), np.float64) for vector in (v, w)])
    compared.append(_Compared("inner products v^T F w", seen["inner products"], pair @ dense @ pair.T, 200))
    notes = []
    try:
        by_leaf = _numbers_by_leaf(F.form, v, [jnp.asarray(d, F.spec.dtype) for d in dampings])
    except NotImplementedError:
        notes.append("not told: the form refuses a damping for each leaf")
    else:
        damped = dense + np.diag(np.repeat(dampings, F.spec.sizes))
        compared.append(_Compared("(F + D)^-1 v", by_leaf[0], np.linalg.solve(damped, np.asarray(_flat(v), np.float64)), 1e4))
        compared.append(_Compared("log det (F + D)", by_leaf[1], np.linalg.slogdet(damped)[1], 1e3))
    checks = [each.check(rounding) for each in compared]
    checks += _order_laws(seen, dense, rounding) + _rebuilt(F)
    if notes:
        checks.append(Check("(F + D)^-1 v", math.nan, 0.0, 1e4 * rounding, None))
    if solver is not None:
        checks += _solver_laws(solver, F, v, dense, damping, rounding)
    return LawCheck(tuple(checks), tuple(notes))


def _flat(tree: Any) -> Array:
    return ravel_pytree(tree)[0]


def _operator(form: Form) -> Operator:
    """An operator with this form. The programs below take only the form, so that they do not depend on the provenance."""
    return Operator(form, Provenance("held to the laws"))


@jax.jit
def _columns(form: Form) -> Array:
    F = _operator(form)
    return jax.vmap(lambda row: _flat(F.mv(F.spec.unravel(row))))(jnp.eye(F.size, dtype=F.spec.dtype))


@jax.jit
def _numbers(form: Form, v: Any, w: Any, damping: Array) -> dict[str, Any]:
    """All numbers that the laws look at, in one program; powers are one call, so that their eigenvectors compile once."""
    F = _operator(form)
    dampings = jnp.stack([damping, damping, 0 * damping])
    powers = jax.vmap(lambda power, damping: _flat(F.power_mv(v, power, damping)))(POWERS.astype(F.spec.dtype), dampings)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b, 2 * a - b]), v, w)
    return {
        "mv": _flat(F.mv(v)),
        "products": jax.vmap(lambda v: _flat(F.mv(v)))(both),
        "matrix": F.as_matrix(),
        "diagonal": _flat(F.diagonal()),
        "trace": F.trace(),
        "quadratic": F.quadratic(v),
        "inner products": F.form.inner_products(jax.tree.map(lambda a, b: jnp.stack([a, b]), v, w)),
        "solve": _flat(F.solve(v, damping)),
        "logdet": F.logdet(damping),
        "eigenvalues": F.eigvalsh(),
        "rank": F.rank(),
        "norm": F.frobenius_norm(),
        "root": powers[0],
        "inverse root": powers[1],
        "power": powers[2],
        "multiple": _flat((2.0 * F).mv(v)),
        "sum": _flat((F + F).mv(v)),
    }


@jax.jit
def _numbers_by_leaf(form: Form, v: Any, dampings: list[Array]) -> tuple[Array, Array]:
    F = _operator(form)
    tree = F.spec.tree(dampings)
    return _flat(F.solve(v, tree)), F.logdet(tree)


def _dense_laws(seen: dict[str, Any], v: np.ndarray, dense: np.ndarray, damping: float) -> Iterator[_Compared]:
    damped = dense + damping * np.eye(len(dense))
    values, basis = np.linalg.eigh(dense)
    power = lambda values, exponent: basis @ (values**exponent * (basis.T @ v))  # noqa: E731
    first, second, both = seen["products"]
    yield _Compared("the matrix", seen["matrix"], dense, 1e3)
    yield _Compared("the matrix less its transpose", seen["matrix"], seen["matrix"].T, 1)
    yield _Compared("F v", seen["mv"], dense @ v, 200)
    yield _Compared("F v under vmap", first, dense @ v, 200)
    yield _Compared("F (2 v - w) = 2 F v - F w", both, 2 * first.astype(float) - second, 1e3)
    yield _Compared("2 F v", seen["multiple"], 2 * dense @ v, 200)
    yield _Compared("(F + F) v", seen["sum"], 2 * dense @ v, 200)
    yield _Compared("the diagonal", seen["diagonal"], np.diag(dense), 200)
    yield _Compared("the trace", seen["trace"], np.trace(dense), 200)
    yield _Compared("v^T F v", seen["quadratic"], v @ dense @ v, 200)
    yield _Compared("(F + d)^-1 v", seen["solve"], np.linalg.solve(damped, v), 1e4)
    yield _Compared("log det (F + d)", seen["logdet"], np.linalg.slogdet(damped)[1], 1e3)
    yield _Compared("the eigenvalues", seen["eigenvalues"], values, 200)
    yield _Compared("the Frobenius norm", seen["norm"], np.linalg.norm(dense), 200)
    yield _Compared("(F + d)^1/2 v", seen["root"], power(values + damping, 0.5), 1e3)
    yield _Compared("(F + d)^-1/2 v", seen["inverse root"], power(values + damping, -0.5), 1e4)
    yield _Compared("F^3/2 v", seen["power"], power(np.maximum(values, 0), 1.5), 1e3)


def _order_laws(seen: dict[str, Any], dense: np.ndarray, rounding: float) -> list[Check]:
    values = np.asarray(seen["eigenvalues"], np.float64)
    least, largest = np.min(values, initial=np.inf), np.max(np.abs(values), initial=0.0) or 1.0
    # Leaves may have different units, so the rank is that of the matrix scaled to a unit diagonal.
    scale = 1 / np.sqrt(np.where(np.diag(dense) > 0, np.diag(dense), 1))
    scaled = np.abs(np.linalg.eigvalsh(scale[:, None] * dense * scale))
    # Eigenvalues between these two cuts may count as zero or not.
    small = [cut * np.max(scaled, initial=0.0) for cut in (1e4 * rounding, min(1e4 * rounding, RANK))]
    most, rank = int(np.sum(scaled > small[1])), int(seen["rank"])
    least_rank = int(np.sum(scaled > small[0]))
    falls = float(np.max(-np.diff(values), initial=0.0))
    within = 1e3 * rounding
    return [
        Check("the eigenvalues ascend", falls, 0.0, 0.0, falls <= 0),
        Check("no eigenvalue is negative", float(least / largest), 0.0, within, bool(least >= -within * largest)),
        Check("the quadratic form is not negative", float(seen["quadratic"]), 0.0, math.inf, bool(seen["quadratic"] >= 0)),
        Check("the rank", float(rank), float(most), float(most - least_rank), least_rank <= rank <= most),
    ]


def _rebuilt(F: Operator) -> list[Check]:
    """The check that an operator is a pytree which crosses ``jit``: rebuilt from its leaves, its static part is the same."""
    leaves, treedef = jax.tree.flatten(F)
    again: Any = jax.tree.structure(jax.tree.unflatten(treedef, leaves))
    same = bool(again == treedef and hash(again) == hash(treedef))
    return [Check("rebuilt from its leaves", float(same), 1.0, 0.0, same)]


def _solver_laws(solver: Solver, F: Operator, v: Any, dense: np.ndarray, damping: float, rounding: float) -> list[Check]:
    x, info = solver(F, v, jnp.asarray(damping, F.spec.dtype))
    flat, b = np.asarray(_flat(x), np.float64), np.asarray(_flat(v), np.float64)
    residual = float(np.linalg.norm(b - dense @ flat - damping * flat) / np.linalg.norm(b))
    within = 1e4 * rounding
    told = float(info.residual)
    return [
        Check("the solver's residual, as reported", residual, told, within + told, bool(abs(residual - told) <= within + told)),
        Check("the solver has converged", float(info.converged), 1.0, 0.0, bool(info.converged)),
    ]


# --- distributions ---------------------------------------------------------------------------------------------------------


def _of_distribution(p: Distribution, key: Array) -> LawCheck:
    if isinstance(p, Joint):
        raise TypeError(f"check_laws: {p} has the laws of its parts. Check them one by one.")
    if not p.batch_shape or p.batch_shape[0] < 2:
        raise ValueError(
            f"check_laws: {p} has the batch shape {p.batch_shape}; expected a batch of two or more, whose members are "
            "neighbours of each other. Give arrays of fields, such as jf.Poisson(log_rate=jnp.array([0.5, 1.0]))."
        )
    draw_key, fisher_key = jax.random.split(key)
    seen = jax.tree.map(np.asarray, _moments(p, draw_key))
    with np.errstate(invalid="ignore", divide="ignore"):
        checks = [*_shapes(p), *_draw_laws(seen), *_batch_laws(p)]
    verdict = check_fisher(_OfFields(type(p)))(jax.tree.leaves(p), fisher_key)
    notes = verdict.notes
    if any(check.passed is None for check in checks):
        notes += ("not told: a mean, a variance, a mode or an entropy that is not finite, or not given",)
    return LawCheck((*checks, *verdict.checks), notes)


@dataclasses.dataclass(frozen=True)
class _OfFields(Around):
    """The distributions of a family as a model whose parameters are their fields."""

    family: Callable[..., Distribution]

    def __call__(self, fields: Any, /, *inputs: Any) -> Distribution:
        return self.family(*fields)


def _neighbour(p: Any) -> Any:
    """The batch rolled by one: the neighbour of each distribution."""
    return jax.tree.map(lambda leaf: jnp.roll(leaf, 1, 0), p)


def _has_entropy(p: Distribution) -> bool:
    return type(p).entropy is not Distribution.entropy


@jax.jit
def _moments(p: Distribution, key: Array) -> dict[str, Any]:
    """Draws and the numbers that they are compared with, one column for each distribution of the batch."""
    x = p.sample(key, (DRAWS,))
    q = _neighbour(p)
    log_p, log_q = jax.vmap(p.log_prob)(x), jax.vmap(q.log_prob)(x)
    return {
        "draws": x.astype(p.mean.dtype),
        "log_p": log_p,
        "ratio": log_p - log_q,
        "mean": p.mean,
        "variance": p.variance,
        "entropy": p.entropy() if _has_entropy(p) else None,
        "kl": p.kl(q),
        "kl_self": p.kl(p),
        "top": p.log_prob(p.mode),
    }


def _mean_of(name: str, draws: np.ndarray, stated: np.ndarray | None) -> Check:
    """Whether the mean of draws agrees with the stated number, in standard errors; undecided if that is infinite or missing."""
    if stated is None:
        return Check(name, math.nan, 0.0, Z, None)
    draws = draws.astype(np.float64)
    error = np.std(draws, axis=0) / math.sqrt(len(draws))
    # If draws do not vary, their mean is exact to rounding.
    error = np.maximum(error, 1e-5 * np.abs(stated) + np.finfo(np.float32).tiny)
    z = (np.mean(draws, axis=0) - stated) / error
    told = np.isfinite(stated)
    worst = float(np.max(np.abs(z[told]), initial=0.0)) if np.any(told) else math.nan
    return Check(name, worst, 0.0, Z, bool(worst <= Z) if np.any(told) else None)


def _draw_laws(seen: dict[str, Any]) -> list[Check]:
    away = np.square(seen["draws"].astype(np.float64) - seen["mean"])
    top = seen["top"][None] - seen["log_p"]
    least = float(np.min(np.where(np.isnan(top), np.inf, top)))
    known = bool(np.any(np.isfinite(seen["top"])))
    eps = 1e3 * float(np.finfo(np.float32).eps) * max(1.0, float(np.max(np.abs(seen["log_p"]))))
    zero = float(np.max(np.abs(seen["kl_self"])))
    return [
        _mean_of("the mean of draws, std errors", seen["draws"], seen["mean"]),
        _mean_of("the variance of draws, std errors", away, seen["variance"]),
        _mean_of("E[log p - log q] = KL, std errors", seen["ratio"], seen["kl"]),
        _mean_of("E[-log p] = entropy, std errors", -seen["log_p"], seen["entropy"]),
        Check("KL(p || p), nats", zero, 0.0, 0.0, zero == 0),
        Check("KL(p || q) is not negative", float(np.min(seen["kl"])), 0.0, math.inf, bool(np.min(seen["kl"]) >= 0)),
        Check("log p(mode) less that of draws", least, 0.0, eps, bool(least >= -eps) if known else None),
    ]


def _shapes(p: Distribution) -> list[Check]:
    """The checks of shapes, and that every result has the dtype of the fields."""
    dtype = jax.tree.leaves(p)[0].dtype
    x = jax.eval_shape(lambda p: p.sample(jax.random.key(0), (3,)), p)
    one = jnp.zeros(x.shape[1:], x.dtype)
    made = jax.eval_shape(lambda p: (p.log_prob(one), p.kl(p), p.mean, p.fisher_sqrt_mv(p.fisher_noise())), p)
    expected = [p.batch_shape, p.batch_shape, x.shape[1:], *(leaf.shape for leaf in jax.tree.leaves(p))]
    leaves = jax.tree.leaves(made)
    wrong = sum(leaf.shape != shape for leaf, shape in zip(leaves, expected, strict=True))
    wrong += x.ndim != 1 + len(p.batch_shape) + p.event_ndim
    other = sum(leaf.dtype != dtype for leaf in leaves)
    return [
        Check("results of other shapes", float(wrong), 0.0, 0.0, wrong == 0),
        Check("results of other dtypes", float(other), 0.0, 0.0, other == 0),
    ]


def _batch_laws(p: Distribution) -> list[Check]:
    """The check that a batch equals its members, as `jax.vmap` over them gives them."""
    whole, members = _whole_and_members(p, p.sample(jax.random.key(0)))
    eps = float(jnp.finfo(jax.tree.leaves(p)[0].dtype).eps)
    pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(members), strict=True)
    checks = [_Compared("a batch is its members", a, b, 1e3).check(eps) for a, b in pairs]
    return [next((check for check in checks if not check.passed), checks[0])]


@jax.jit
def _whole_and_members(p: Any, x: Any) -> tuple[Any, Any]:
    def asked(p: Any, q: Any, x: Any) -> Any:
        noise = jax.tree.map(jnp.ones_like, p.fisher_noise())
        tangent = jax.tree.map(jnp.ones_like, p)
        return p.log_prob(x), p.kl(q), p.mean, p.fisher_sqrt_mv(noise), p.fisher_mv(tangent)

    q = _neighbour(p)
    return asked(p, q, x), jax.vmap(asked)(p, q, x)
