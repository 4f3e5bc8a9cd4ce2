"""Solves distributed over the devices of a mesh: by the rows of a Gram matrix, which no device holds whole, or by layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._cholesky_on_mesh import Lower, Strips, block_size, factorised, solved_by
from jaxfisher._damped import raised
from jaxfisher._inverse import LeavingNothingOut
from jaxfisher._jobs_on_mesh import Devices
from jaxfisher._linalg import matmul, norm, to_unit, twice
from jaxfisher._operators.apart import LayersApart, bare
from jaxfisher._operators.block import BlockDiagonal
from jaxfisher._operators.form import Form
from jaxfisher._operators.from_scores import FromScores, Scaled, by_gram
from jaxfisher._operators.identity import Shifted
from jaxfisher._operators.inverted import Inverted, flat_inverse
from jaxfisher._operators.kronecker import Kronecker
from jaxfisher._operators.operator import Operator, as_operator
from jaxfisher._operators.sum import Sum
from jaxfisher._pytree import array_fields
from jaxfisher._scores import Scores
from jaxfisher._system import Factorise
from jaxfisher._values import described, whole

BLOCK = 256
"""The default number of columns factored at a time."""


@array_fields("scores", repr=False)
class Spread(FromScores):
    """`FromScores`, with solves by a Gram matrix whose rows are spread over an axis of a mesh."""

    strips: Strips

    name = "exact as scores, solves spread"
    at_once = 1

    def scaled(self, factor: Scalar) -> Spread:
        return Spread(self.scores.reweighted(factor), self.strips)

    def rescaled(self, factors: Sequence[Scalar]) -> Spread:
        return Spread(self.scores.rescaled(tuple(factors)), self.strips)

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> FromScores:
        part = super().restrict(keep, treedef)
        # If the part has fewer parameters than rows, the p x p matrix is the smaller one, and is not distributed.
        return Spread(part.scores, self.strips) if part.scores.num_rows <= part.spec.size else part

    def plus(self, other: Form) -> Form | None:
        if not isinstance(other, FromScores):
            return None
        joined = FromScores(self.scores).plus(FromScores(other.scores))
        scores = None if joined is None else joined.as_scores()
        return None if scores is None else _spread(scores, self.strips, "a sum of Fishers")

    def inverses(self, largest: Scalar, factorise: Factorise) -> Callable[[Scalar], Inverted]:
        scaled = Scaled(self.scores, to_unit(self.scores.bound(), jnp.sqrt(jnp.abs(largest))))
        gram = jax.lax.stop_gradient(_gram(scaled, self.strips))

        def at(damping: Scalar) -> Inverted:
            damping = twice(damping, scaled.factor)
            factored = _factored(gram, jax.lax.stop_gradient(damping), self.strips)
            return flat_inverse(self.spec, partial(factorise.solved, by_gram(scaled, gram, damping, factored)))

        return at


@dataclasses.dataclass(frozen=True)
class Apart(LeavingNothingOut):
    """`Factored` and `ManyTimes` by one Cholesky factor whose rows are spread over devices, for a damping above zero.

    Attributes:
        lower: the factor of ``matrix + damping I``, whose diagonal is raised by its rounding error if necessary.
        told: whether the damping could be told from zero.
        strips: how the rows are spread.
    """

    lower: Lower
    told: Bool[Array, ""]
    strips: Strips

    @property
    def unit(self) -> Float[Array, " rows"]:
        """See `Factored`: all rows have unit one."""
        return jnp.ones(len(self.lower.rows), self.lower.rows.dtype)

    @property
    def rank(self) -> Int[Array, ""]:
        """See `Factored`: nothing is left out."""
        return jnp.asarray(len(self.lower.rows), jnp.int32)

    @property
    def clear(self) -> Bool[Array, ""]:
        """See `Factored`: eigenvalues are unknown, so only a damping makes this true."""
        return self.told

    def in_units(self, b: Float[Array, " rows"]) -> Float[Array, " rows"]:
        """See `Factored`."""
        return solved_by(self.lower, b, self.strips)

    def at_zero(self, b: Float[Array, " rows"]) -> Float[Array, " rows"]:
        """See `ManyTimes`."""
        return self.in_units(b)

    def size(self, c: Float[Array, " rows"]) -> Scalar:
        """See `ManyTimes`."""
        return norm(matmul(c, self.lower.rows))


def _gram(scaled: Scaled, strips: Strips) -> Float[Array, "rows rows"]:
    """``X X^T``: each device computes its own rows, from its own factors and those of all other devices."""
    root, scores = scaled.root, scaled.scores.rescaled((scaled.factor,) * len(scaled.scores.spec.sizes))
    # `cross_gram` takes the factors of its own rows as they are, and scales those of the other block. Unscaled factors are sent
    # as they are held, so each device should keep the rows of the other block: transpose, since the matrix is symmetric.
    matrix = root[:, None] * scores.cross_gram(scores).T * root[None, :]
    return jax.lax.with_sharding_constraint(matrix, strips.sharding)


def _factored(gram: Float[Array, "rows rows"], damping: Scalar, strips: Strips) -> Apart:
    there = jax.lax.with_sharding_constraint(jnp.eye(len(gram), dtype=bool), strips.sharding)
    # Take the diagonal as a sum, to which every device contributes its part.
    largest = jnp.max(jnp.sum(jnp.where(there, gram, 0), 1)) + damping
    told = ~(damping <= jnp.finfo(gram.dtype).eps * largest)
    return Apart(factorised(jnp.where(there, raised(gram, damping), gram), strips), told, strips)


def spread_solves(fisher: Operator, mesh: Mesh, axis: str, block: int | None = None) -> Operator:
    r"""The same Fisher, or view by layers, with solves whose matrices are distributed over the devices of a mesh.

    .. math:: (F + \lambda I)^{-1} v, \qquad \text{by } S S^T + \lambda I = L L^T \text{ with the rows of } L \text{ spread}.

    It is for n x n matrices that do not fit on one device. With n rows on D devices each device holds ``n^2 / D`` numbers, does
    ``n^3 / D`` flops, three times its share of the least possible, and receives n numbers for every row. Each device computes
    the inner products of its rows from the factors of all rows, ``n T (d_in + d_out)`` numbers per layer; nothing else is
    gathered. With scores in chunks (``max_bytes=``) no device has more than the factors of two chunks. Only `solve` changes.

    **For a view by layers**, `jaxfisher.kronecker`, each factor is inverted by one device alone, which sends the inverse, or
    the eigenvectors, to all others: the ``m^3`` flops of a factor are done once, not on every device. The costliest factors
    are assigned first, each to the device with the least work. Running means, turns and all results are the same on any number
    of devices: ``jf.kfac(view=lambda F: jf.spread_solves(jf.kronecker(F), mesh, "examples"))``.

    **When it is the wrong one.** If the matrix fits on one device, that is faster. If n is above the number of parameters, the
    rows x rows matrix is the larger one. Factors of a few hundred are inverted sooner than they are sent.

    Args:
        fisher: an operator held as scores, or a view with Kronecker factors, with or without a multiple of the identity added.
            The scores of a sum must be held whole (not in chunks), and must not be centred.
        mesh: a mesh of automatic axes. The examples need not be sharded over it, but should be.
        axis: the axis of the mesh over which rows, or factors, are distributed; its size must divide the number of rows.
        block: for scores, the most columns that are factored at a time; None for 256.

    Returns:
        An operator whose `solve` is as accurate as its solver asks: to ``rtol`` with ``jf.Cholesky(rtol=)``, and as far as
        rounding allows without a solver. The damping plus the multiple of the identity must be above zero; if the dtype cannot
        tell it from zero, no solution is called converged. To use this function as a ``view``, write
        ``functools.partial(jf.spread_solves, mesh=mesh, axis="examples")``.

    Raises:
        TypeError: ``fisher`` is neither held as scores nor a view by layers, or it is the sum of two such views (take
            `jaxfisher.kronecker` of the sum instead); ``block`` is no whole number of at least one.
        ValueError: the mesh has no such axis, or the axis is explicit; the size of the axis does not divide the number of rows;
            a ``block`` with a view by layers.

    Reference: Chen and Heyl, Empowering deep neural quantum states through efficient optimization (Nature Physics 2024), for
    solves of this size; Blackford et al., ScaLAPACK Users' Guide (SIAM 1997), for the factorisation; Pauloski et al., KAISA: an
    adaptive second-order optimizer framework for deep neural networks (SC 2021), for the layers.

    >>> import jax, jax.numpy as jnp, jaxfisher as jf
    >>> mesh = jax.make_mesh((1,), ("examples",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> log_prob = jf.log_likelihood(lambda w, x: jf.Normal(x @ w, 1.0))
    >>> F = jf.empirical_fisher(log_prob)(jnp.zeros(3), jnp.eye(2, 3), jnp.array([1.0, 2.0]))
    >>> print(jf.spread_solves(F, mesh, "examples").solve(jnp.ones(3), damping=0.5))  # F = diag(1/2, 2, 0)
    [1.  0.4 2. ]
    """
    fisher = as_operator(fisher, "spread_solves")
    layers = bare(fisher.form)
    if isinstance(layers, BlockDiagonal) and any(isinstance(bare(block), Kronecker) for block in layers.blocks):
        if block is not None:
            raise ValueError(f"spread_solves: `block` is {block}; expected none with {fisher}, which has no rows.")
        _check_axis(mesh, axis)
        apart = LayersApart(layers.blocks, layers.members, layers.spec, Devices(mesh, axis))
        return dataclasses.replace(fisher, form=_under(fisher.form, apart))
    scores = layers.as_scores()
    if isinstance(layers, BlockDiagonal) and any(isinstance(bare(block), Sum) for block in layers.blocks):
        raise TypeError(
            f"spread_solves: {fisher} has a sum of several products over a layer, whose inverse is not made of inverses of "
            "factors. Expected one product per layer, that of the sum: jf.spread_solves(jf.kronecker(fisher), mesh, axis)."
        )
    if scores is None:
        raise TypeError(
            f"spread_solves: {fisher} has neither scores nor layers whose solves could be spread. Expected a Fisher held as "
            "scores, such as jf.exact_fisher returns, a sum of such Fishers with scores held whole (without `batch_size=`, "
            "`max_bytes=` or `center=`), or jf.kronecker(fisher). A multiple of the identity may be added to each."
        )
    if block is not None and (whole(block) or 0) < 1:
        raise TypeError(f"spread_solves: `block` is {described(block)}; expected a whole number of columns, at least one.")
    _check_axis(mesh, axis)
    strips = Strips(mesh, axis, BLOCK if block is None else block)
    return dataclasses.replace(fisher, form=_under(fisher.form, _spread(scores, strips, str(fisher))))


def _spread(scores: Scores, strips: Strips, called: str) -> Spread:
    """The scores with distributed solves, factored in blocks of at most ``strips.block`` columns."""
    rows, devices = scores.num_rows, strips.mesh.shape[strips.axis]
    if rows % devices:
        raise ValueError(
            f"spread_solves: {called} has {rows} rows, which cannot be spread evenly over {devices} devices. Pad the data to a "
            "multiple, with `weights=` of zero for the padding."
        )
    return Spread(scores, strips._replace(block=block_size(rows, strips.block)))


def _under(form: Form, base: Form) -> Form:
    """The form with its base replaced if it is a `Shifted`; else the new base itself."""
    return dataclasses.replace(form, base=base) if isinstance(form, Shifted) else base


def _check_axis(mesh: Mesh, axis: str) -> None:
    if axis not in mesh.shape:
        raise ValueError(f"spread_solves: `mesh` has no axis {axis!r}; it has {list(mesh.shape)}.")
    if mesh.axis_types[mesh.axis_names.index(axis)] != AxisType.Auto:
        raise ValueError(
            f"spread_solves: the axis {axis!r} of `mesh` is explicit; expected an automatic one, as of jax.make_mesh(..., "
            "axis_types=(jax.sharding.AxisType.Auto,))."
        )
