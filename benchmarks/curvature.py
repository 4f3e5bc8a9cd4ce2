"""The costs of views of a Fisher and of steps of solvers, in plain gradients of the same batch: see README.md beside this file.

python benchmarks/curvature.py [--check] [workload ...]
"""

from __future__ import annotations

# This import comes first: it sets the number of BLAS threads, which NumPy and JAX read when they load BLAS.
from engine import (
    CHECK,
    Case,
    Sizes,
    Times,
    compiled,
    megabytes,
    mlp,
    mlp_log_prob,
    mlp_model,
    plain_gradient,
    quick_check,
    shape_name,
    time_in_turn,
    timed_head,
    workload_parser,
)

# isort: split

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jaxfisher as jf

RANK = 20
ITERATIONS = 10
"""The number of conjugate gradient iterations over which the time of one is averaged."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """One line of a table, in words."""

    case: str
    gradient: str
    ours: str
    gradients: str
    memory: str
    gradient_memory: str
    curvlinops: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """A measured program, and the figure that curvlinops publishes for a similar one, in gradients."""

    what: str
    case: Case
    published: str = ""
    base: Case | None = None
    """If given, the time is that of ``case`` less that of ``base``, divided by `ITERATIONS`."""


def table(name: str, gradient: Case, entries: Sequence[Entry], repeats: int) -> list[Cost]:
    """The rows of a table: all programs timed in turn, in units of the gradient."""
    cases = [gradient, *(case for entry in entries for case in (entry.case, entry.base) if case is not None)]
    times = iter(time_in_turn(cases, repeats))
    unit = next(times)
    rows = []
    for entry in entries:
        own = next(times)
        if entry.base is not None:
            pairs = zip(own.seconds, next(times).seconds, strict=True)
            own = Times(tuple((more - less) / ITERATIONS for more, less in pairs))
        rows.append(
            Cost(
                f"{name}: {entry.what}",
                str(unit),
                str(own),
                f"{own.median / unit.median:.2f}",
                megabytes(entry.case.temporary),
                megabytes(gradient.temporary),
                entry.published,
            )
        )
    return rows


def _on_networks(entries: Callable[[Any, Any, Any], list[Entry]], sizes: Sizes) -> list[Cost]:
    rows = []
    networks = [(sizes.small, 256), (sizes.small, 512), (sizes.big, 256)]
    for widths, n in networks if sizes is not CHECK else networks[:1]:
        arguments = mlp(widths, sizes.examples(n))
        gradient = compiled(plain_gradient(mlp_log_prob), *arguments)
        rows += table(shape_name(widths, sizes.examples(n)), gradient, entries(*arguments), sizes.repeats)
    return rows


def _damping(fisher: jf.Operator) -> Any:
    return jax.jit(jf.relative_damping)(fisher, jnp.asarray(1e-2))


def _exact(params: Any, x: Any) -> dict[str, jf.Operator]:
    """The exact Fisher in both its forms."""
    held = jax.jit(jf.exact_fisher(mlp_model))(params, x)
    return {"held factors": held, "jf.implicit_fisher": jf.implicit_fisher(mlp_model)(params, x)}


def factors(sizes: Sizes) -> list[Cost]:
    """Kronecker factors of every layer, from parameters and data; the eigenvalues of EKFAC in a given basis."""

    def entries(params: Any, x: Any, y: Any) -> list[Entry]:
        basis = jax.jit(lambda *args: jf.kronecker(jf.exact_fisher(mlp_model)(*args)))(params, x)
        published = "2.7 (ResNet-50), 1.6 (nanoGPT)"
        return [
            Entry(
                "KFAC of the empirical Fisher",
                compiled(lambda *args: jf.kronecker(jf.empirical_fisher(mlp_log_prob)(*args)), params, x, y),
                published,
            ),
            Entry(
                "KFAC of the sampled Fisher, one draw",
                compiled(
                    lambda params, key, x: jf.kronecker(jf.sampled_fisher(mlp_model, num_samples=1)(params, key, x)),
                    params,
                    jax.random.key(0),
                    x,
                ),
                published,
            ),
            Entry(
                "KFAC of the exact Fisher",
                compiled(lambda *args: jf.kronecker(jf.exact_fisher(mlp_model)(*args)), params, x),
                published,
            ),
            Entry(
                "EKFAC of the exact Fisher, basis given by its factors (eigh included)",
                compiled(lambda p, x, basis: jf.eigen_kronecker(jf.exact_fisher(mlp_model)(p, x), basis), params, x, basis),
                "16 (ResNet-50), 17 (nanoGPT): eigh alone",
            ),
        ]

    return _on_networks(entries, sizes)


def inverses(sizes: Sizes) -> list[Cost]:
    """One damped solve from held factors or scores: Kronecker exactly and with factored damping, block-diagonal."""

    def entries(params: Any, x: Any, y: Any) -> list[Entry]:
        gradient = jax.jit(plain_gradient(mlp_log_prob))(params, x, y)
        factors = jax.jit(lambda *args: jf.kronecker(jf.exact_fisher(mlp_model)(*args)))(params, x)
        empirical = jax.jit(jf.empirical_fisher(mlp_log_prob))(params, x, y)
        return [
            Entry(
                "exact damped inverse of KFAC (eigh of every factor)",
                compiled(lambda *args: jf.solve(*args)[0], factors, gradient, _damping(factors)),
                "16 (ResNet-50), 17 (nanoGPT): eigh alone",
            ),
            Entry(
                "factored damping of KFAC (Cholesky of every factor)",
                compiled(lambda f, v, d: jf.solve(f, v, d, jf.factored_solve)[0], factors, gradient, _damping(factors)),
            ),
            Entry(
                "block-diagonal by layer, empirical Fisher, n x n a layer",
                compiled(
                    lambda fisher, v, damping: jf.solve(jf.block_diagonal(fisher, jf.layers(fisher)), v, damping)[0],
                    empirical,
                    gradient,
                    _damping(empirical),
                ),
            ),
        ]

    return _on_networks(entries, sizes)


def sketches(sizes: Sizes) -> list[Cost]:
    """Twenty eigenpairs: exactly from the scores of the empirical Fisher, sketched from products with the exact one."""

    def entries(params: Any, x: Any, y: Any) -> list[Entry]:
        empirical = jax.jit(jf.empirical_fisher(mlp_log_prob))(params, x, y)
        exact = _exact(params, x)
        rank = min(RANK, x.shape[0])
        return [
            Entry(f"low_rank({rank}), empirical Fisher", compiled(lambda fisher: jf.low_rank(fisher, rank), empirical)),
            *(
                Entry(
                    f"nystrom({rank}), exact Fisher, {name}",
                    compiled(lambda fisher, key: jf.nystrom(fisher, key, rank), fisher, jax.random.key(0)),
                )
                for name, fisher in exact.items()
            ),
        ]

    return _on_networks(entries, sizes)


def iterations(sizes: Sizes) -> list[Cost]:
    """One iteration of conjugate gradients on the exact Fisher: a product and the vectors; memory of the whole solve."""

    def entries(params: Any, x: Any, y: Any) -> list[Entry]:
        gradient = jax.jit(plain_gradient(mlp_log_prob))(params, x, y)
        operators = _exact(params, x)
        damping = _damping(operators["held factors"])

        def case(operator: jf.Operator, steps: int) -> Case:
            # With a tolerance of zero the solver takes all of its steps.
            solver = jf.CG(rtol=0.0, max_steps=steps)
            return compiled(lambda fisher, v, damping: jf.solve(fisher, v, damping, solver)[0], operator, gradient, damping)

        return [
            Entry(
                f"one iteration, {name}",
                case(operator, 1 + ITERATIONS),
                "2.7 (ResNet-50), 1.6 compiled; 3.1 (nanoGPT): a product",
                case(operator, 1),
            )
            for name, operator in operators.items()
        ]

    return _on_networks(entries, sizes)


def directions(sizes: Sizes) -> list[Cost]:
    """From parameters and data to the damped exact-Fisher direction at a residual of 1e-2, along the training that it makes."""
    n, steps = sizes.examples(256), (0, 5, 20)
    start, images, labels = mlp(sizes.small, 6 * n)
    batches = [(images[k : k + n], labels[k : k + n]) for k in range(0, len(images), n)]

    def direction(params: Any, x: Any, y: Any, damping: Any) -> Any:
        fisher = jf.implicit_fisher(mlp_model)(params, x)
        solver = jf.CG(rtol=1e-2, max_steps=100)
        return jf.solve(fisher, plain_gradient(mlp_log_prob)(params, x, y), damping, solver)

    gradient = compiled(plain_gradient(mlp_log_prob), start, *batches[0])
    program = compiled(direction, start, *batches[0], jnp.asarray(1.0)).program
    rows = []
    for damping in map(jnp.asarray, (1.0, 0.3, 0.1)):
        params, entries = start, []
        for k in range(steps[-1] + 1):
            case = Case(program, (params, *batches[k % len(batches)], damping))
            d, info = case()
            if k in steps:
                entries.append(Entry(f"damping {damping:g}, after {k} steps: {info.iterations} iterations", case))
            params = jax.tree.map(jnp.subtract, params, d)
        rows += table(shape_name(sizes.small, n), gradient, entries, sizes.repeats)
    return rows


WORKLOADS: dict[str, Callable[[Sizes], list[Cost]]] = {
    function.__name__: function for function in (factors, inverses, sketches, iterations, directions)
}


def main() -> None:
    """Measure the workloads given on the command line, or all of them."""
    quick_check(workload_parser(__doc__, WORKLOADS), WORKLOADS, timed_head)


if __name__ == "__main__":
    main()
