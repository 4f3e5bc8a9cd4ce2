"""Random solves of every kind, each compared with its exact solution: none may report convergence and be wrong.

    python tests/random_solves.py --count 2000 --seed 0

A problem is a matrix of scores X with a condition number from 1 to 1e12 (of F = X^T W X, columns in equal units), columns in
units from 1e-12 to 1e12, of full rank or not, a damping of zero or up to 1e6, and a right-hand side from 1e-30 to 1e30. The
oracle takes the numbers that the operator stores and solves in arithmetic of 1,000 bits, where nothing is ill-conditioned and a
pivot is either large or exactly zero. These count as wrong:

* a reported residual that differs from the true one by more than the rounding of ``F x``;
* with a damping that the dtype can tell from zero, or by an iteration: converged, and a true residual above the promised one;
* otherwise: converged, and an error of the solution above 30 roots of eps. At full rank the error is measured in units in which
  F has a unit diagonal, and else in the parameters' own units, in which the solution has minimum norm.

A form that stores a matrix knows an eigenvalue only up to the rounding of the largest (after scaling to a unit diagonal). If a
problem has a smaller eigenvalue, which then counts as zero, the solution is not compared. Forms that store scores resolve such
eigenvalues and are always compared.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from mpmath import mpf

import jaxfisher as jf
from jaxfisher._damped import by_cholesky
from jaxfisher._operators.operator import exact_solve

BITS = 1000
SHAPES = {"tall": (14, 6), "square": (6, 6), "short": (4, 9)}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Scores, a right-hand side and a damping, as float64 arrays of numbers of the dtype, and how they were made."""

    scores: np.ndarray
    v: np.ndarray
    damping: float
    made: str
    easy: bool


def problem(rng: np.random.Generator, n: int, p: int, dtype: type) -> Problem:
    """One random problem, whose numbers the dtype represents exactly."""
    made = []
    condition = 10 ** rng.uniform(0, 12)
    rank = min(n, p)
    u, w = (np.linalg.qr(rng.normal(size=(size, rank)))[0] for size in (n, p))
    x = np.sqrt(n) * (u * np.geomspace(1, condition**-0.5, rank)) @ w.T
    made.append(f"condition {condition:.0e}")
    mixed = rng.random() < 0.5
    units = 10 ** rng.uniform(-12, 12, p) if mixed else np.full(p, 10 ** rng.uniform(-6, 6))
    if mixed:
        made.append("mixed units")
    x = np.asarray(x * units, dtype).astype(float)
    kind = rng.choice(["plain", "plain", "dead columns", "equal columns", "equal rows"])
    made.append(kind)
    few = rng.choice(p, size=rng.integers(1, p // 2 + 1), replace=False)
    if kind == "dead columns":
        x[:, few] = 0
    if kind == "equal columns":
        # Multiples by powers of two are exact, and give each column a unit of its own.
        other = rng.choice(np.setdiff1d(np.arange(p), few), size=len(few))
        x[:, few] = x[:, other] * 2.0 ** rng.integers(-20, 20, len(few))
    if kind == "equal rows":
        x[n // 2 :] = x[: n - n // 2]
    v = right_side(rng, x, dtype, made)
    well_posed = condition * np.finfo(dtype).eps ** 0.5 < 1 / 250 and kind != "equal columns"
    easy = well_posed and not mixed and 1e-10 < np.max(np.abs(v)) < 1e10
    largest = np.max(np.sum(x**2, 0)) / n
    damping = rng.choice([0.0, 0.0, 10 ** rng.uniform(-12, 6), largest * 10 ** rng.uniform(-9, 0)])
    return Problem(x, np.asarray(v, dtype).astype(float), float(np.asarray(damping, dtype)), ", ".join(made), bool(easy))


def right_side(rng: np.random.Generator, x: np.ndarray, dtype: type, made: list[str]) -> np.ndarray:
    """A right-hand side of any size: a gradient, a vector that no gradient is, or one coordinate."""
    kind = rng.choice(["in range", "in the units of gradients", "anything", "one coordinate"])
    made.append(kind)
    if kind == "in range":
        v = x.T @ rng.normal(size=len(x))
    elif kind == "in the units of gradients":
        v = rng.normal(size=x.shape[1]) * np.sqrt(np.mean(x**2, 0))
    elif kind == "anything":
        v = rng.normal(size=x.shape[1])
    else:
        v = np.eye(x.shape[1])[rng.integers(x.shape[1])]
    size = np.max(np.abs(v)) or 1.0
    v = v / size * 10 ** (rng.uniform(-30, 30) if rng.random() < 0.5 else 0.0)
    # XLA flushes numbers below the normal ones to zero.
    return np.where(np.abs(v) < np.finfo(dtype).tiny, 0, v)


# --- the library's solution ------------------------------------------------------------------------------------------------


def linear(w, x):
    """A log-density whose score is its datum: the Fisher is X^T X / n."""
    return jnp.dot(jnp.concatenate(w), x, precision="highest")


def empirical(x):
    """The Fisher of these scores, over two leaves."""
    half = x.shape[1] // 2
    params = [jnp.zeros(half, x.dtype), jnp.zeros(x.shape[1] - half, x.dtype)]
    return jf.empirical_fisher(linear)(params, x)


def implicit(x):
    """The same Fisher by products alone: a normal whose mean is linear."""
    half = x.shape[1] // 2
    params = [jnp.zeros(half, x.dtype), jnp.zeros(x.shape[1] - half, x.dtype)]
    return jf.implicit_fisher(lambda w, x: jf.Normal(linear(w, x), jnp.ones((), x.dtype)))(params, x)


def kronecker(x, view=jf.kronecker):
    """The Kronecker view of a layer whose inputs are the first columns and whose output cotangents are the rest."""
    inputs = x.shape[1] // 2
    log_prob = lambda w, a, g: jnp.dot(jnp.dot(a, w, precision="highest"), g, precision="highest")  # noqa: E731
    params = jnp.zeros((inputs, x.shape[1] - inputs), x.dtype)
    return view(jf.empirical_fisher(log_prob)(params, x[:, :inputs], x[:, inputs:]))


FORMS = {
    "scores": empirical,
    "dense": lambda x: jf.dense(empirical(x)),
    "diagonal": lambda x: jf.diagonal(empirical(x)),
    "blocks": lambda x: jf.block_diagonal(empirical(x)),
    "implicit": implicit,
    "kronecker": kronecker,
    "eigen-Kronecker": lambda x: kronecker(x, jf.eigen_kronecker),
    "low rank": lambda x: jf.low_rank(empirical(x), min(x.shape)),
    "a prior": lambda x: empirical(x) + jf.scaled_identity(empirical(x), 0.0),
    "sum of forms": lambda x: empirical(x[: len(x) // 2]) + jf.dense(empirical(x[len(x) // 2 :])),
}
SOLVERS = {
    "exact": None,
    "path": None,
    "cg": jf.CG(),
    "cg, by nystrom": jf.CG(preconditioner=lambda F: jf.nystrom(F, jax.random.key(0), 3)),
    "lsmr": jf.LSMR(),
    "cholesky": None,
    "cholesky, as training needs": None,
}
RTOL = {"cholesky": 0.0, "cholesky, as training needs": 1e-3}
"""The accuracy asked of the solvers that need a damping above zero."""
WAYS = [(form, "exact") for form in FORMS] + [
    ("scores", "path"),
    ("dense", "path"),
    ("kronecker", "path"),
    ("scores", "cg"),
    ("implicit", "cg"),
    ("scores", "cg, by nystrom"),
    ("scores", "lsmr"),
    ("scores", "cholesky"),
    ("scores", "cholesky, as training needs"),
    ("dense", "cholesky"),
    ("blocks", "cholesky"),
    ("implicit", "cholesky"),
    ("sum of forms", "cholesky"),
]
"""The forms and the solvers that go with them."""


@functools.cache
def program(form: str, solver: str):
    """One compiled program for all problems of a shape and dtype, which it solves one by one."""

    def one(problem):
        x, v, damping = problem
        F = FORMS[form](x)
        if solver == "path":
            found, info = jax.tree.map(lambda leaf: leaf[0], jf.solve_path(F, F.spec.unravel(v), damping[None]))
        elif solver in RTOL:
            found, info = exact_solve(F, F.spec.unravel(v), damping, by_cholesky(RTOL[solver]))
        else:
            found, info = jf.solve(F, F.spec.unravel(v), damping, solver=SOLVERS[solver])
        return F.spec.ravel(found, "x"), info, F.rank(), held(F.form, x)

    return jax.jit(lambda *problems: jax.lax.map(one, problems))


def held(form, x):
    """The numbers that a form stores: pairs of rows and their weights, and a matrix that is added."""
    match type(form).__name__:
        case "Dense":
            return (), form.matrix
        case "Diagonal":
            return (), jnp.diag(form.spec.ravel(form.entries, "entries"))
        case "LowRank":
            return ((form.vectors.T, form.values),), None
        case "BlockDiagonal" if hasattr(form.blocks[0], "values"):
            return (), (form.blocks[0].inputs[0], form.blocks[0].outputs[0], form.blocks[0].values[0])
        case "BlockDiagonal" if hasattr(form.blocks[0], "inputs"):
            return (), (form.blocks[0].inputs[0], form.blocks[0].outputs[0])
        case "BlockDiagonal":
            first = jnp.arange(x.shape[1]) < form.spec.sizes[0]
            return tuple((jnp.where(first == side, x, 0), form.blocks[0].scores.weights) for side in (True, False)), None
        case "Sum":
            return ((x[: len(x) // 2], form.terms[0].scores.weights),), form.terms[1].matrix
        case "Shifted":
            return held(form.base, x)
        case "Implicit":
            return ((x, form.weights),), None
        case _:
            return ((x, form.scores.weights),), None


# --- the oracle ------------------------------------------------------------------------------------------------------------


def numbers(x) -> np.ndarray:
    """An array of floats as an array of `BITS`-bit numbers."""
    return np.frompyfunc(mpf, 1, 1)(np.asarray(x, float))


def matrix_of(rows, matrix) -> np.ndarray:
    """The exact ``F`` of the numbers that a form stores."""
    total = 0
    if isinstance(matrix, tuple):
        total = np.kron(*map(numbers, matrix[:2]))
        if len(matrix) == 3:
            total = total * numbers(matrix[2]).reshape(-1) @ total.T
    elif matrix is not None:
        total = total + numbers(matrix)
    for x, weights in rows:
        x = numbers(x)
        total = total + x.T @ (numbers(weights)[:, None] * x)
    return total


@dataclasses.dataclass(frozen=True)
class Exact:
    """The solution, the rank, the smallest pivot relative to the largest, and the units in which F has a unit diagonal."""

    x: np.ndarray
    rank: int
    smallest: float
    units: np.ndarray


def exactly(F: np.ndarray, v: np.ndarray, damping: float) -> Exact:
    """``(F + damping I)^+ v`` by a Cholesky factor with complete pivoting, in units in which F has a unit diagonal."""
    F = F + np.diag(numbers(np.full(len(v), damping)))
    diagonal = np.array([abs(F[i, i]) for i in range(len(v))])
    units = np.array([1 / mpmath.sqrt(d) if d else mpf(1) for d in diagonal])
    rest = units[:, None] * F * units[None, :]
    columns, pivots = [], []
    for _ in v:
        sizes = [abs(rest[i, i]) for i in range(len(v))]
        k = int(np.argmax(np.array(sizes)))
        if sizes[k] < mpf(2) ** (-BITS // 2):
            break
        pivots.append(rest[k, k])
        columns.append(rest[:, k] / rest[k, k])
        rest = rest - np.outer(columns[-1], columns[-1]) * rest[k, k]
    if not columns:
        return Exact(numbers(np.zeros(len(v))), 0, 1.0, units)
    # F = C D C^T with C of full column rank, so that F^+ = C (C^T C)^-1 D^-1 (C^T C)^-1 C^T.
    C = np.stack(columns, 1) / units[:, None]
    inner = C.T @ C
    first = solved(inner, C.T @ v)
    x = C @ solved(inner, first / np.array(pivots))
    smallest = float(min(map(abs, pivots)) / max(map(abs, pivots)))
    return Exact(x, len(pivots), smallest, units)


def solved(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``A^-1 b`` of a positive definite matrix, by Gaussian elimination."""
    A, b = A.copy(), b.copy()
    for k in range(len(b)):
        for i in range(k + 1, len(b)):
            share = A[i, k] / A[k, k]
            A[i, k:] = A[i, k:] - share * A[k, k:]
            b[i] = b[i] - share * b[k]
    for k in reversed(range(len(b))):
        b[k] = (b[k] - A[k, k + 1 :] @ b[k + 1 :]) / A[k, k] if k + 1 < len(b) else b[k] / A[k, k]
    return b


def length(x: np.ndarray):
    """The Euclidean norm."""
    return mpmath.sqrt(sum((a * a for a in x), start=mpf(0)))


def ratio(a, b) -> float:
    return float(a / b) if b else (0.0 if not a else float("inf"))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is wrong with a solution, if anything, and the numbers by which it was judged."""

    wrong: str
    converged: bool
    reported: float
    residual: float
    error: float
    exact: Exact
    rank: int


def judged(problem: Problem, x, info, kept, dtype: type, form: str, solver: str) -> Verdict:
    """The verdict on one solution."""
    eps = float(np.finfo(dtype).eps)
    if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(kept)):
        # The matrix has entries beyond the range of the dtype.
        nothing = Exact(numbers(np.zeros(len(problem.v))), 0, 1.0, numbers(np.ones(len(problem.v))))
        wrong = "converged, on what is not finite" if bool(info.converged) else ""
        return Verdict(wrong, bool(info.converged), float(info.residual), np.nan, np.nan, nothing, int(info.rank))
    rows, matrix = kept
    F = matrix_of(rows, matrix)
    v = numbers(problem.v)
    exact = exactly(F, v, problem.damping)
    reported, converged, rank = float(info.residual), bool(info.converged), int(info.rank)
    if not np.all(np.isfinite(x)):
        return Verdict(
            "converged, and not finite" if converged or info.finite else "", converged, reported, np.nan, np.nan, exact, rank
        )
    x = numbers(x)
    damped = F + np.diag(numbers(np.full(len(v), problem.damping)))
    off = v - damped @ x
    residual = ratio(length(off), length(v))
    # The rounding error of F x, computed through scores as large as the diagonal says, and of entries of x that underflow.
    sizes = np.abs(x) * mpf(10 * len(v) * eps) + mpf(float(np.finfo(dtype).tiny))
    roots = np.array([mpmath.sqrt(abs(damped[i, i])) for i in range(len(v))])
    rounding = ratio(length(roots * (roots @ sizes)), length(v)) + 10 * eps
    wrong = []
    beyond = np.isinf(reported) and residual > np.finfo(dtype).max
    unknown = (np.isnan(reported) or beyond) and not converged
    if not unknown and not abs(reported - residual) <= 0.1 * residual + rounding:
        wrong.append("residual misreported")
    promised = max(eps**0.5, RTOL.get(solver, 1e-5 if SOLVERS[solver] else 0.0))
    error = np.nan
    diagonal = max(float(F[i, i]) for i in range(len(v)))
    if problem.damping > eps * diagonal or SOLVERS[solver]:
        if converged and residual > 2 * promised:
            wrong.append("converged with a large residual")
    else:
        full = exact.rank == len(v)
        in_units = exact.units if full else numbers(np.ones(len(v)))
        error = ratio(length((x - exact.x) / in_units), length(exact.x / in_units))
        # A damping is not among the scores, so with one F is known only up to rounding.
        resolved = exact.smallest > 30 * len(v) * eps or (form in HOLDS_SCORES and not problem.damping)
        if converged and resolved and error > 30 * eps**0.5:
            wrong.append("converged to a wrong solution")
        if converged and problem.damping and length(off * exact.units) > 2 * eps**0.5 * length(v * exact.units):
            wrong.append("converged with a large residual in units")
    return Verdict("; ".join(wrong), converged, reported, residual, error, exact, rank)


DAMPED = ("lsmr", *RTOL)
"""Solvers that take any right-hand side only if there is a damping."""
HOLDS_SCORES = ("scores", "blocks", "a prior")
LAYERS = ("kronecker", "eigen-Kronecker")


# --- many of them ----------------------------------------------------------------------------------------------------------


def groups(count: int, seed: int, shapes=tuple(SHAPES), dtypes=("float32", "float64"), ways=tuple(WAYS)):
    """Problems by shape, dtype, form and solver: one program each."""
    kinds = list(itertools.product(shapes, dtypes, ways))
    rng = np.random.default_rng(seed)
    for k, (shape, dtype, (form, solver)) in enumerate(kinds):
        many = count // len(kinds) + (k < count % len(kinds))
        n, p = SHAPES[shape]
        if form in LAYERS:
            p = 5
        dtype = np.dtype(dtype).type
        if many:
            problems = [problem(rng, n, p, dtype) for _ in range(many)]
            yield (
                shape,
                dtype,
                form,
                solver,
                [dataclasses.replace(made, easy=made.easy and (solver not in DAMPED or made.damping > 0)) for made in problems],
            )


def verdicts(dtype: type, form: str, solver: str, problems: list[Problem]):
    """Each problem with its verdict."""
    data = [np.stack([getattr(p, name) for p in problems]).astype(dtype) for name in ("scores", "v", "damping")]
    if form in LAYERS:
        inputs = data[0].shape[2] // 2
        data[1] = np.resize(data[1], (len(problems), inputs * (data[0].shape[2] - inputs)))
        problems = [dataclasses.replace(p, v=v.astype(float)) for p, v in zip(problems, data[1], strict=True)]
    found = jax.tree.map(np.asarray, program(form, solver)(*map(jnp.asarray, data)))
    for i, made in enumerate(problems):
        x, info, _, kept = jax.tree.map(lambda leaf, i=i: leaf[i], found)
        yield made, judged(made, x, info, kept, dtype, form, solver)


def described(made: Problem, verdict: Verdict) -> str:
    """A problem and its verdict in one line."""
    return (
        f"{made.made}, damping {made.damping:.1e}, |v| {np.max(np.abs(made.v)):.0e}, reported {verdict.reported:.1e}, "
        f"true {verdict.residual:.1e}, error {verdict.error:.1e}, smallest pivot {verdict.exact.smallest:.0e}, "
        f"rank {verdict.rank} of {verdict.exact.rank}"
    )


def main() -> int:
    """Solve and judge random problems. The exit status is the number of wrong solutions, at most 100."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--form", action="append", help="only these forms")
    parser.add_argument("--dtype", action="append", help="only these dtypes")
    parser.add_argument("--easy", action="store_true", help="print what is well-conditioned and yet not converged")
    parser.add_argument("--show", type=int, default=5, help="how many wrong ones of each kind to print")
    given = parser.parse_args()
    ways = tuple(way for way in WAYS if not given.form or way[0] in given.form)
    total = collections.Counter()
    for shape, dtype, form, solver, problems in groups(
        given.count, given.seed, dtypes=given.dtype or ("float32", "float64"), ways=ways
    ):
        counts, shown = collections.Counter(), 0
        for made, verdict in verdicts(dtype, form, solver, problems):
            counts["converged" if verdict.converged else "not converged"] += 1
            counts["wrong"] += bool(verdict.wrong)
            counts["easy"] += made.easy
            counts["easy, not converged"] += made.easy and not verdict.converged
            if given.easy and made.easy and not verdict.converged:
                print(f"  not converged: {described(made, verdict)}")
            if verdict.wrong and shown < given.show:
                shown += 1
                print(f"  {verdict.wrong}: {described(made, verdict)}")
        print(f"{shape} {dtype.__name__} {form}, {solver}: {dict(counts)}", flush=True)
        total += counts
    print(dict(total))
    return total["wrong"]


mpmath.mp.prec = BITS

if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    sys.exit(min(main(), 100))
