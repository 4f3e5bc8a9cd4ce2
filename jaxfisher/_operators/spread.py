"""Scores whose rows x rows solves are spread over the devices of a mesh: no device has the square matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, Float, Scalar

from jaxfisher._cholesky_on_mesh import Lower, Strips, block_size, factorised, solved_by
from jaxfisher._engine import cross_gram
from jaxfisher._linalg import inverse_power, norm, power_or_one, to_unit, twice
from jaxfisher._operators.from_scores import FromScores, Scaled, by_rows
from jaxfisher._operators.inverted import Inverted, flat_inverse
from jaxfisher._operators.operator import Operator, as_operator, scores_of
from jaxfisher._pytree import array_fields
from jaxfisher._scores import HeldScores
from jaxfisher._system import Factorise, Solved
from jaxfisher._values import described, whole
from jaxfisher._varying import linear_solve

SWEEPS = 3
"""How often a solution is corrected."""


@array_fields("scores", repr=False)
class Spread(FromScores):
    """`FromScores`, with solves by a Gram matrix whose rows are spread over an axis of a mesh."""

    strips: Strips

    name = "exact as scores, solves spread"

    def scaled(self, factor: Scalar) -> Spread:
        return Spread(self.scores.reweighted(factor), self.strips)

    def rescaled(self, factors: Sequence[Scalar]) -> Spread:
        return Spread(self.scores.rescaled(tuple(factors)), self.strips)

    def inverses(self, largest: Scalar, factorise: Factorise) -> Callable[[Scalar], Inverted]:
        factor = to_unit(self.scores.bound(), jnp.sqrt(jnp.abs(largest)))
        scaled = Scaled(self.scores, factor)
        gram = jax.lax.stop_gradient(_gram(scaled, self.strips))

        def at(damping: Scalar) -> Inverted:
            damping = twice(damping, factor)
            there = jax.lax.with_sharding_constraint(jnp.eye(len(gram), dtype=gram.dtype), self.strips.sharding)
            lower = factorised(gram + jax.lax.stop_gradient(damping) * there, self.strips)
            return flat_inverse(self.spec, partial(_solved, scaled, damping, lower, self.strips))

        return at


def _gram(scaled: Scaled, strips: Strips) -> Float[Array, "rows rows"]:
    """``X X^T``: each device makes its own rows, from its own factors and all others."""
    assert isinstance(scaled.scores, HeldScores)
    leaves, root = scaled.scores.leaves, scaled.root
    matrix = root[:, None] * cross_gram(leaves, leaves, scaled.factor) * root[None, :]
    return jax.lax.with_sharding_constraint(matrix, strips.sharding)


def _solved(scaled: Scaled, damping: Scalar, lower: Lower, strips: Strips, v: Float[Array, " p"]) -> Solved:
    """``v`` split into its part in the rows' span and the rest, as the exact route of one device does, and corrected."""
    inverse = partial(solved_by, lower, strips=strips)

    def product(y: Array) -> Array:
        return scaled.out_of_rows(scaled.into_rows(y)) + damping * y

    def corrected(product: Callable[[Array], Array], b: Array) -> tuple[Array, Array]:
        def sweep(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
            y = state[0] + by_rows(scaled, inverse, 1 / damping, state[1])
            return y, b - product(y)

        return jax.lax.fori_loop(0, SWEEPS, sweep, (jnp.zeros_like(b), b))

    size = power_or_one(jnp.max(jnp.abs(v), initial=0.0))
    b = v * inverse_power(size)
    y, rest = linear_solve(product, b, corrected)
    sound = norm(rest) <= jnp.finfo(v.dtype).eps ** 0.5 * norm(b)
    x = y * scaled.factor * (size * scaled.factor)
    return Solved(x, rest * size, jnp.asarray(v.size, jnp.int32), sound)


def spread_solves(fisher: Operator, mesh: Mesh, axis: str, block: int = 256) -> Operator:
    r"""The same Fisher with solves by a rows x rows matrix that is spread over the devices of a mesh.

    .. math:: (F + \lambda I)^{-1} v, \qquad \text{by } S S^T + \lambda I = L L^T \text{ with the rows of } L \text{ spread}.

    For more examples than the square of one device's memory: with n rows on D devices each holds ``n^2 / D`` numbers and does
    ``n^3 / D`` flops, three times its share of the least, and receives n numbers for every row. Inner products are made where
    their row is, from the factors of all rows, ``n T (d_in + d_out)`` numbers a layer; nothing else is gathered. Everything
    but `solve` is as before.

    **When it is the wrong one.** Where the matrix fits on one device that is faster. Where n is above the number of parameters,
    the rows x rows matrix is the larger one.

    Args:
        fisher: an operator held as scores in memory, neither centred nor in pieces.
        mesh: of automatic axes; the examples need not be spread over it, but should.
        axis: the axis of the mesh over which rows are spread; its size must divide the number of rows.
        block: how many columns are factored at a time, at most.

    Returns:
        An operator; its damping must be above zero, and a solve at zero is not finite. As a ``view`` it is
        ``functools.partial(jf.spread_solves, mesh=mesh, axis="examples")``.

    Raises:
        TypeError: ``fisher`` is not held as scores, or these are not in memory; ``block`` is no whole number.
        ValueError: an axis that the mesh has not, or that is explicit; a number of rows that its size does not divide.

    Reference: Chen and Heyl, Empowering deep neural quantum states through efficient optimization (Nature Physics 2024), for
    solves of this size; Blackford et al., ScaLAPACK Users' Guide (SIAM 1997), for the factorisation.

    >>> import jax, jax.numpy as jnp, jaxfisher as jf
    >>> mesh = jax.make_mesh((1,), ("examples",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> log_prob = jf.log_likelihood(lambda w, x: jf.Normal(x @ w, 1.0))
    >>> F = jf.empirical_fisher(log_prob)(jnp.zeros(3), jnp.eye(2, 3), jnp.array([1.0, 2.0]))
    >>> print(jf.spread_solves(F, mesh, "examples").solve(jnp.ones(3), damping=0.5))  # F = diag(1/2, 2, 0)
    [1.  0.4 2. ]
    """
    fisher = as_operator(fisher, "spread_solves")
    scores = scores_of(fisher, "spread_solves")
    if not isinstance(scores, HeldScores):
        raise TypeError(f"spread_solves: {scores} are not held in memory as they are; leave `batch_size` or `center` out.")
    if (whole(block) or 0) < 1:
        raise TypeError(f"spread_solves: `block` is {described(block)}; expected a whole number of columns, at least one.")
    if axis not in mesh.shape:
        raise ValueError(f"spread_solves: `mesh` has no axis {axis!r}; it has {list(mesh.shape)}.")
    if mesh.axis_types[mesh.axis_names.index(axis)] != AxisType.Auto:
        raise ValueError(
            f"spread_solves: the axis {axis!r} of `mesh` is explicit; expected an automatic one, as of jax.make_mesh(..., "
            "axis_types=(jax.sharding.AxisType.Auto,))."
        )
    rows, devices = scores.num_rows, mesh.shape[axis]
    if rows % devices:
        raise ValueError(
            f"spread_solves: {fisher} has {rows} rows, which cannot be spread evenly over {devices} devices. Pad the data to a "
            "multiple, with `weights=` of zero for the padding."
        )
    strips = Strips(mesh, axis, block_size(rows, block))
    return Operator(Spread(scores, strips), fisher.provenance)
