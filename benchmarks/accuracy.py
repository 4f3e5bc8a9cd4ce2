"""How accurate float32 results are, against NumPy in float64: see README.md beside this file.

python benchmarks/accuracy.py [--check] [workload ...]
"""

from __future__ import annotations

# This import comes first: it sets the number of BLAS threads, which NumPy and JAX read when they load BLAS.
from engine import CHECK, Sizes, dense_layers, digits, head_line, mlp_logits, quick_check, workload_parser

# isort: split

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Scalar

import jaxfisher as jf

GOAL = 1e-4
"""The goal for the relative residual of a solve and the relative error of a log-determinant."""
GOAL_DAMPING = 1e-6
"""The goal holds for dampings down to this share of the mean eigenvalue."""

Wide = np.ndarray[Any, np.dtype[np.float64]]

# ---------------------------------------------------------------------------------------------------------- the reference


@dataclasses.dataclass(frozen=True)
class Reference:
    """``F = X^T X`` in float64, from the singular values of ``X``, which are accurate to 1e-16 of the largest."""

    x: Float[Wide, "rows p"]

    @functools.cached_property
    def _svd(self) -> tuple[Wide, Wide]:
        _, singular, right = np.linalg.svd(self.x, full_matrices=False)
        return singular, right

    @property
    def mean_eigenvalue(self) -> float:
        """The trace divided by p."""
        return float(np.sum(np.square(self.x))) / self.x.shape[1]

    def solve(self, v: Float[Wide, " p"], damping: float) -> Float[Wide, " p"]:
        """``(F + damping I)^-1 v``."""
        singular, right = self._svd
        inside = right @ v
        return right.T @ (inside / (np.square(singular) + damping)) + (v - right.T @ inside) / damping

    def logdet(self, damping: float) -> float:
        """``log det (F + damping I)``."""
        singular, _ = self._svd
        rest = self.x.shape[1] - singular.size
        return float(np.sum(np.log(np.square(singular) + damping)) + rest * np.log(damping))

    def error(self, x: Any, v: Float[Wide, " p"], damping: float) -> float:
        """``|x - x*| / |x*|``."""
        exact = self.solve(v, damping)
        return float(np.linalg.norm(flat(x) - exact) / np.linalg.norm(exact))

    def residual(self, x: Any, v: Float[Wide, " p"], damping: float) -> float:
        """``|(F + damping I) x - v| / |v|``."""
        found = flat(x)
        image = self.x.T @ (self.x @ found) + damping * found
        return float(np.linalg.norm(image - v) / np.linalg.norm(v))


def flat(tree: Any) -> Float[Wide, " p"]:
    """A pytree as one vector in float64."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def verdict(misses: list[str]) -> str:
    """Whether the goal was reached, and which ways missed it."""
    return "NO: " + ", ".join(misses) if misses else "yes"


# ---------------------------------------------------------------------------------------------------- given singular values


@dataclasses.dataclass(frozen=True)
class Methods:
    """A row of the table: the relative error and the relative residual of each way to solve."""

    case: str
    woodbury: str
    dual: str
    natural_grad: str
    scores: str
    dense: str
    cg: str
    lsmr: str
    solve_path: str
    goal: str
    reached: str


def row_log_prob(w: Float[Array, " p"], row: Float[Array, " p"]) -> Scalar:
    """A log-density whose score is the given row."""
    return jnp.vdot(row, w, precision=jax.lax.Precision.HIGHEST)


def spread_rows(n: int, p: int) -> Float[np.ndarray, "n p"]:
    """Float32 rows ``S`` such that the singular values of ``S / sqrt(n)`` are spaced geometrically over [1e-2, 1]."""
    rng = np.random.default_rng(0)
    rank = min(n, p)
    left, right = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for size in (n, p))
    return ((left * np.geomspace(1, 1e-2, rank)) @ right.T * n**0.5).astype(np.float32)


def _kernel(rows: Float[Array, "n p"], damping: Scalar) -> tuple[Array, Any]:
    x = rows / rows.shape[0] ** 0.5
    gram = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
    return x, jax.scipy.linalg.cho_factor(gram + damping * jnp.eye(x.shape[0]))


def plain_woodbury(rows: Float[Array, "n p"], v: Float[Array, " p"], damping: Scalar) -> Float[Array, " p"]:
    """``(v - X^T (X X^T + damping)^-1 X v) / damping``."""
    x, factor = _kernel(rows, damping)
    return (v - x.T @ jax.scipy.linalg.cho_solve(factor, x @ v)) / damping


def plain_dual(rows: Float[Array, "n p"], v: Float[Array, " p"], damping: Scalar) -> Float[Array, " p"]:
    """``X^T (X X^T + damping)^-1 e`` for ``v = X^T e``."""
    x, factor = _kernel(rows, damping)
    n = rows.shape[0]
    return x.T @ jax.scipy.linalg.cho_solve(factor, jnp.full(n, n**-0.5))


def _fisher(rows: Float[Array, "n p"]) -> jf.Operator:
    return jf.empirical_fisher(row_log_prob)(jnp.zeros(rows.shape[1]), rows)


def _natural_grad(rows: Array, v: Array, damping: Scalar) -> Array:
    # The loss is minus the mean log-density, so the direction is minus the solution.
    return -jf.natural_grad(row_log_prob, damping=damping)(jnp.zeros(rows.shape[1]), rows)


def _least_squares(rows: Array, v: Array, damping: Scalar) -> Array:
    scores = jf.scores(row_log_prob)(jnp.zeros(rows.shape[1]), rows)
    return jf.LSMR().least_squares(scores, jnp.ones(rows.shape[0]), damping)[0]


WAYS: dict[str, Callable[[Array, Array, Scalar], Array]] = {
    "woodbury": plain_woodbury,
    "dual": plain_dual,
    "natural_grad": _natural_grad,
    "scores": lambda rows, v, damping: jf.solve(_fisher(rows), v, damping)[0],
    "dense": lambda rows, v, damping: jf.solve(jf.dense(_fisher(rows)), v, damping)[0],
    "cg": lambda rows, v, damping: jf.solve(_fisher(rows), v, damping, solver=jf.CG())[0],
    "lsmr": _least_squares,
    "solve_path": lambda rows, v, damping: jf.solve_path(_fisher(rows), v, damping[None])[0][0],
}
BY_COORDINATES = ("dual", "natural_grad", "lsmr")
"""These take the right-hand side exactly, by its coordinates in the rows; the others take a vector rounded to float32."""
NOT_OURS = ("woodbury", "dual")


def singular_values(sizes: Sizes) -> list[Methods]:
    """Relative error and relative residual of a solve, singular values of X geometrically over [1e-2, 1]."""
    shapes = [(64, 1024), (256, 1024), (1024, 256), (1024, 64)] if sizes is not CHECK else [(64, 1024)]
    return [row for n, p in shapes for row in _singular_values(sizes.examples(n), sizes.examples(p))]


def _singular_values(n: int, p: int) -> list[Methods]:
    rows = spread_rows(n, p)
    reference = Reference(rows.astype(np.float64) / n**0.5)
    exact = reference.x.sum(0) / n**0.5  # X^T e with e = 1 / sqrt(n), the gradient of the mean log-density
    rounded = exact.astype(np.float32)
    ways = {name: jax.jit(way) for name, way in WAYS.items()}
    dampings = {f"{damping:g}": damping for damping in (1e-2, 1e-4, 1e-6)}
    dampings[f"{GOAL_DAMPING:g} of the mean eigenvalue"] = GOAL_DAMPING * reference.mean_eigenvalue
    made = []
    for words, damping in dampings.items():
        near = np.float32(damping)
        cells, misses = {}, []
        for name, way in ways.items():
            v = exact if name in BY_COORDINATES else rounded.astype(np.float64)
            x = way(jnp.asarray(rows), jnp.asarray(rounded), jnp.asarray(near))
            residual = reference.residual(x, v, float(near))
            cells[name] = f"{reference.error(x, v, float(near)):.1e}, {residual:.1e}"
            if name not in NOT_OURS and not residual <= GOAL:
                misses.append(name)
        case = f"n = {n}, p = {p}, damping {words}"
        made.append(Methods(case, **cells, goal=f"residuals at most {GOAL:g}", reached=verdict(misses)))
    return made


# ------------------------------------------------------------------------------------------------------------ real Fishers


@dataclasses.dataclass(frozen=True)
class Swept:
    """A row of a sweep: one damping."""

    damping: str
    residual_scores: str
    residual_dense: str
    residual_path: str
    error_scores: str
    error_dense: str
    error_path: str
    logdet: str
    logdet_scores: str
    logdet_dense: str
    goal: str
    reached: str
    note: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """An exact Fisher and the gradient of the mean loss: a model of one example, its parameters and data, in float32."""

    output: Callable[[Any, Array], Array]
    family: Callable[[Array], jf.Distribution]
    root: Callable[[Array], Float[Array, "k outputs"]]
    params: Any
    x: Array
    y: Array

    def predicted(self, params: Any, x: Array) -> jf.Distribution:
        """The model in the library's form."""
        return self.family(self.output(params, x))

    def gradient(self) -> Any:
        """The gradient of the mean negative log-likelihood, by `jax.grad`."""

        def loss(params: Any) -> Scalar:
            return -jnp.mean(jax.vmap(lambda x, y: self.predicted(params, x).log_prob(y))(self.x, self.y))

        return jax.jit(jax.grad(loss))(self.params)

    def reference(self) -> Reference:
        """The same Fisher from JAX's own Jacobians in float64, without the library."""
        with jax.enable_x64(True):
            params, inputs = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), (self.params, self.x))
            vector, unravel = ravel_pytree(params)

            def rows(x: Array) -> Array:
                jacobian = jax.jacrev(lambda w: self.output(unravel(w), x))(vector).reshape(-1, vector.size)
                return self.root(self.output(params, x)) @ jacobian

            stacked = jax.jit(lambda inputs: jax.lax.map(rows, inputs))(inputs)
            return Reference(np.asarray(stacked).reshape(-1, vector.size) / self.x.shape[0] ** 0.5)


def categorical_root(logits: Float[Array, " k"]) -> Float[Array, "k k"]:
    """``R`` with ``R^T R = diag(pi) - pi pi^T``, the Fisher of a categorical in its logits."""
    probabilities = jax.nn.softmax(logits)
    root = jnp.sqrt(probabilities)
    return jnp.diag(root) - root[:, None] * probabilities[None, :]


def poisson_root(log_rate: Scalar) -> Float[Array, "1 1"]:
    """The root of the rate, the Fisher of a Poisson distribution in its log-rate."""
    return jnp.exp(0.5 * log_rate)[None, None]


def sweep(problem: Problem, sizes: Sizes) -> list[Swept]:
    """The table of a problem: one row for each damping."""
    gradient, reference = problem.gradient(), problem.reference()
    v = flat(gradient)
    fisher = jax.jit(jf.exact_fisher(problem.predicted))(problem.params, problem.x)
    held = {"scores": fisher, "dense": jax.jit(jf.dense)(fisher)}
    both = jax.jit(lambda operator, v, damping: (jf.solve(operator, v, damping), operator.logdet(damping)))
    shares = [10.0**k for k in (range(-8, 3) if sizes is not CHECK else (-6, 2))]
    dampings = np.asarray([share * reference.mean_eigenvalue for share in shares], np.float32)
    path = jax.jit(jf.solve_path)(fisher, gradient, jnp.asarray(dampings))
    made = []
    for k, (share, near) in enumerate(zip(shares, dampings, strict=True)):
        damping = float(near)
        found = {name: both(operator, gradient, jnp.asarray(near)) for name, operator in held.items()}
        solved = {name: solution for name, (solution, _) in found.items()}
        solved["path"] = jax.tree.map(lambda leaf, k=k: leaf[k], path)
        residuals = {f"residual_{name}": reference.residual(x, v, damping) for name, (x, _) in solved.items()}
        errors = {f"error_{name}": reference.error(x, v, damping) for name, (x, _) in solved.items()}
        exact = reference.logdet(damping)
        logdets = {f"logdet_{name}": abs(float(logdet) - exact) / abs(exact) for name, (_, logdet) in found.items()}
        misses = [name for name, value in (residuals | logdets).items() if not value <= GOAL]
        due = k >= shares.index(GOAL_DAMPING)
        made.append(
            Swept(
                f"{share:g}",
                **{name: f"{value:.1e}" for name, value in (residuals | errors | logdets).items()},
                logdet=f"{exact:.5g}",
                goal=f"residuals, log det at most {GOAL:g}" if due else "",
                reached=verdict(misses) if due else "",
                note="; ".join(reported(name, info, v.size) for name, (_, info) in solved.items() if not info.converged),
            )
        )
    return made


def reported(name: str, info: jf.SolveInfo, size: int) -> str:
    """The library's own report of a solve that did not converge."""
    rank = "" if info.rank == size else f", rank {int(info.rank)} of {size}"
    return f"{name} says: residual {float(info.residual):.0e}{rank}"


def mlp(sizes: Sizes) -> list[Swept]:
    """Exact Fisher of an MLP 64-16-10 on 300 digits (p = 1210, fewer than rows); damping in mean eigenvalues."""
    params, (x, y) = dense_layers(sizes.widths(64, 16, 10)), digits(sizes.examples(300))
    return sweep(Problem(mlp_logits, _categorical, categorical_root, params, x, y), sizes)


def _categorical(logits: Array) -> jf.Categorical:
    return jf.Categorical(logits=logits)


def glm(sizes: Sizes) -> list[Swept]:
    """Exact Fisher of a Poisson regression on the diabetes data in their own units (p = 11); damping in mean eigenvalues."""
    features, target = diabetes()
    n = sizes.examples(442)
    x, y = jnp.asarray(features[:n], jnp.float32), jnp.asarray(target[:n], jnp.int32)
    params = {"weights": jnp.zeros(x.shape[1]), "intercept": jnp.log(jnp.mean(y.astype(jnp.float32)))}
    return sweep(Problem(linear, jf.Poisson, poisson_root, params, x, y), sizes)


def linear(params: Any, x: Float[Array, " p"]) -> Scalar:
    """A linear predictor."""
    return jnp.vdot(x, params["weights"], precision=jax.lax.Precision.HIGHEST) + params["intercept"]


def diabetes() -> tuple[Float[np.ndarray, "442 10"], Int[np.ndarray, "442"]]:
    """Scikit-learn's diabetes data in their own units, with a count as target; similar random numbers without scikit-learn."""
    try:
        from sklearn.datasets import load_diabetes
    except ImportError:
        rng = np.random.default_rng(0)
        means, spreads = np.geomspace(1, 200, 10), np.geomspace(0.5, 30, 10)
        return means + spreads * rng.standard_normal((442, 10)), rng.poisson(150, 442)
    features, target = load_diabetes(return_X_y=True, scaled=False)
    return features, target


def cnn(sizes: Sizes) -> list[Swept]:
    """Exact Fisher of a CNN of two convolutions on 100 digits (p = 1626, more than rows); damping in mean eigenvalues."""
    params, (x, y) = cnn_params(4, max(1, 8 // sizes.shrink)), digits(sizes.examples(100))
    return sweep(Problem(cnn_logits, _categorical, categorical_root, params, x, y), sizes)


def cnn_params(*channels: int) -> Any:
    """Parameters of `cnn_logits`."""
    shapes = [(3, 3, 1, channels[0]), (3, 3, *channels), (16 * channels[1], 10)]
    keys = jax.random.split(jax.random.key(4), len(shapes))
    return [(jax.random.normal(k, s) / np.prod(s[:-1]) ** 0.5, jnp.zeros(s[-1])) for k, s in zip(keys, shapes, strict=True)]


def cnn_logits(params: Any, x: Float[Array, "64"]) -> Float[Array, "10"]:
    """Two convolutions, the second with stride 2, and a dense layer."""
    *convolutions, (weight, bias) = params
    image = x.reshape(1, 8, 8, 1)
    axes = ("NHWC", "HWIO", "NHWC")
    for stride, (kernel, shift) in enumerate(convolutions, start=1):
        image = jnp.tanh(jax.lax.conv_general_dilated(image, kernel, (stride, stride), "SAME", dimension_numbers=axes) + shift)
    return image.reshape(-1) @ weight + bias


WORKLOADS: dict[str, Callable[[Sizes], list[Any]]] = {
    function.__name__: function for function in (singular_values, mlp, glm, cnn)
}


def main() -> None:
    """Measure the workloads given on the command line, or all of them."""
    quick_check(workload_parser(__doc__, WORKLOADS), WORKLOADS, head_line)


if __name__ == "__main__":
    main()
