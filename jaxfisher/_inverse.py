r"""Inverting a damped matrix as well as its dtype allows.

All routes follow one rule. The matrix is first scaled to a unit diagonal by powers of two, which add no rounding error, so that
a parameter in very different units is not mistaken for a null direction. A damping that the dtype can tell from zero makes
every direction invertible: by a Cholesky factor if that is well posed, otherwise by eigenvectors. Without one (zero, or too
small beside the matrix) eigenvectors show the directions whose eigenvalues are zero to rounding. These are left out, and the
solution is the one of minimum norm in the parameters' own units.

Reference: Higham, Accuracy and Stability of Numerical Algorithms (2002), theorem 10.7 (Demmel: Cholesky and unit diagonals).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._linalg import (
    cholesky,
    eigenvalues,
    matmul,
    mirrored,
    norm,
    resolved,
    twice,
    unit_diagonal,
    without_noise,
)
from jaxfisher._null_space import projected
from jaxfisher._varying import cond

Map = Callable[[Float[Array, " p"]], Float[Array, " p"]]


class Factored(Protocol):
    """The inverse of a damped matrix, in units in which the matrix has a unit diagonal or is of unit size.

    Attributes:
        unit: the factors that the matrix is multiplied by on both sides.
        rank: the number of directions inverted.
        told: whether the damping could be told from zero; if not, this is the pseudo-inverse.
        left_out: a combination of all directions that were left out, in those units; zero if there are none.
        clear: whether every eigenvalue that was kept is well above rounding; true with a damping.
        floor: a number added to the diagonal of the inverted matrix, in those units.
    """

    @property
    def unit(self) -> Float[Array, " m"]: ...
    @property
    def rank(self) -> Int[Array, ""]: ...
    @property
    def told(self) -> Bool[Array, ""]: ...
    @property
    def left_out(self) -> Float[Array, " m"]: ...
    @property
    def clear(self) -> Bool[Array, ""]: ...
    @property
    def floor(self) -> Scalar: ...

    def in_units(self, b: Float[Array, " m"]) -> Float[Array, " m"]:
        """``(unit (matrix + damping I) unit)^-1 b``, as accurate as one application of the factors makes it."""
        ...

    def apply(self, b: Float[Array, " m"]) -> Float[Array, " m"]:
        """``(matrix + damping I)^-1 b``, likewise."""
        ...

    def projected(self, product: Map) -> Self:
        """If directions were left out, the pseudo-inverse with the null space taken from ``product``, of the same matrix."""
        ...

    def astray(self, b: Float[Array, " m"], y: Float[Array, " m"]) -> Scalar:
        """An estimate of how much of ``unit y``, with ``y = in_units(b)``, may lie in the null space."""
        ...


class LeavingNothingOut:
    """What is the same in every `Factored` that leaves no direction out."""

    @property
    def floor(self: Factored) -> Scalar:
        """See `Factored`."""
        return jnp.zeros((), self.unit.dtype)

    @property
    def left_out(self: Factored) -> Float[Array, " m"]:
        """See `Factored`."""
        return jnp.zeros_like(self.unit)

    def apply(self: Factored, b: Float[Array, " m"]) -> Float[Array, " m"]:
        """See `Factored`."""
        return self.unit * self.in_units(self.unit * b)

    def projected(self, product: Map) -> Self:
        """See `Factored`."""
        return self

    def astray(self, b: Float[Array, " m"], y: Float[Array, " m"]) -> Scalar:
        """See `Factored`."""
        return jnp.zeros((), b.dtype)


class Inverse(NamedTuple):
    """`Factored` by a Cholesky factor if that can be trusted, else as ``factor diag(inverted) factor^T``.

    Columns of ``factor`` that were left out hold null vectors at first and, after `projected`, the errors of these.
    """

    factor: Float[Array, "m m"]
    inverted: Float[Array, " m"]
    kept: Bool[Array, " m"]
    by_cholesky: Bool[Array, ""]
    unit: Float[Array, " m"]
    told: Bool[Array, ""]
    left_out: Float[Array, " m"]
    clear: Bool[Array, ""]

    @property
    def rank(self) -> Int[Array, ""]:
        """See `Factored`."""
        return jnp.sum(self.kept, dtype=jnp.int32)

    @property
    def floor(self) -> Scalar:
        """See `Factored`."""
        return jnp.zeros((), self.unit.dtype)

    def in_units(self, b: Float[Array, " m"]) -> Float[Array, " m"]:
        """See `Factored`."""
        return cond(
            self.by_cholesky,
            lambda: jax.scipy.linalg.cho_solve((self.factor, True), b),
            lambda: matmul(self.factor, self.inverted * matmul(self.factor.T, b)),
        )

    def apply(self, b: Float[Array, " m"]) -> Float[Array, " m"]:
        """See `Factored`."""
        return self.unit * self.in_units(self.unit * b)

    def projected(self, product: Map) -> Inverse:
        """See `Factored`."""
        if not self.kept.size:
            return self
        factor, left_out = cond(
            jnp.all(self.kept),
            lambda: (self.factor, self.left_out),
            lambda: projected(self.factor, self.inverted, self.kept, self.unit, product),
        )
        return self._replace(factor=factor, left_out=left_out)

    def astray(self, b: Float[Array, " m"], y: Float[Array, " m"]) -> Scalar:
        """See `Factored`."""
        coefficients = self.inverted * matmul(self.factor.T, b)
        # Projecting out a direction leaves the rounding error of the whole column.
        columns = jnp.sqrt(jnp.sum(jnp.square(self.unit[:, None] * self.factor), 0))
        rounded = jnp.vdot(columns, jnp.abs(coefficients))
        turned = norm(jnp.where(self.kept, 0, matmul(self.factor.T, self.unit * (self.unit * y))))
        return turned + 4 * jnp.finfo(y.dtype).eps * rounded


def invert(matrix: Float[Array, "m m"], damping: Scalar) -> Inverse:
    """Factor ``matrix + damping I`` by Cholesky or eigenvectors, whichever can be trusted; only that one runs.

    Only the upper triangle is read. If directions are left out, the result is a pseudo-inverse only after `projected`.
    """
    size, eps = matrix.shape[0], jnp.finfo(matrix.dtype).eps
    diagonal = jnp.abs(jnp.diagonal(matrix)) + damping
    unit = unit_diagonal(diagonal)
    # `~(a <= b)` rather than `a > b`, so that a NaN counts as told from zero.
    told = ~(damping <= eps * jnp.max(diagonal, initial=0.0))
    shares = twice(damping, unit)
    scaled = unit[:, None] * matrix * unit[None, :] + jnp.diag(shares)
    factor = cholesky(scaled)
    # With a damping a pivot may be as small as the rounding error of one entry.
    well_posed = told & jnp.all(jnp.square(jnp.diagonal(factor)) > eps * jnp.diagonal(scaled))

    def by_cholesky() -> tuple[Array, ...]:
        ones = jnp.ones(size, factor.dtype)
        return factor, ones, ones > 0, jnp.asarray(True)

    def by_eigenvectors() -> tuple[Array, ...]:
        found = eigen(mirrored(matrix), unit, told, shares)
        return found.vectors, reciprocal(found.values, found.kept, jnp.where(told, damping, 0)), found.kept, found.clear

    factor, inverted, kept, clear = cond(well_posed, by_cholesky, by_eigenvectors)
    return Inverse(factor, inverted, kept, well_posed, unit, told, jnp.zeros_like(unit), clear)


def multiplied(matrix: Float[Array, "m m"], damping: Scalar, unit: Float[Array, " m"]) -> Map:
    """The product with ``unit (matrix + damping I) unit``, for a matrix given by its upper triangle."""
    return lambda y: unit * matmul(mirrored(matrix), unit * y) + twice(damping, unit) * y


class Eigen(NamedTuple):
    """The decomposition ``unit^-1 (matrix + damping I)^-1 unit^-1 = vectors diag(1 / values) vectors^T``.

    Attributes:
        vectors: the eigenvectors, in units.
        values: the eigenvalues, without the damping if it can be told from zero: add it to them.
        kept: which eigenvalues are not left out.
        clear: as in `Factored`.
    """

    vectors: Float[Array, "m m"]
    values: Float[Array, " m"]
    kept: Bool[Array, " m"]
    clear: Bool[Array, ""]


def eigen(matrix: Float[Array, "m m"], unit: Float[Array, " m"], told: Bool[Array, ""], shares: Array | float = 0.0) -> Eigen:
    """The eigenvectors of a matrix, in its own units if the damping can be told from zero: it then adds to each eigenvalue.

    Otherwise they are those of ``unit matrix unit + shares``, which has a unit diagonal.
    """
    scale = jnp.where(told, 1, unit)
    scaled = scale[:, None] * matrix * scale[None, :] + jnp.diag(jnp.broadcast_to(jnp.where(told, 0, shares), unit.shape))
    values, vectors = jnp.linalg.eigh(scaled, symmetrize_input=False)
    largest = jnp.max(jnp.abs(values), initial=0.0)
    # With a damping every direction is kept; eigenvalues that are zero to rounding are set to zero, and leave the damping.
    values = resolved(values, jnp.where(told, largest, 0), largest, values.size)
    kept = told | (values != 0)
    return Eigen((scale / unit)[:, None] * vectors, values, kept, told | is_clear(values, kept))


def is_clear(values: Float[Array, " m"], kept: Bool[Array, " m"]) -> Bool[Array, ""]:
    """Whether every eigenvalue that was kept is well above the rounding error of the decomposition."""
    sizes = jnp.abs(values)
    return jnp.all(sizes >= 4 * values.size * jnp.finfo(values.dtype).eps * jnp.max(sizes, initial=0.0), where=kept)


def reciprocal(values: Float[Array, " m"], kept: Bool[Array, " m"], damping: Scalar) -> Float[Array, " m"]:
    """``1 / (values + damping)`` for the eigenvalues kept, else zero."""
    # An eigenvalue that is negative within rounding may outweigh a small damping, and turn the sign of the inverse.
    values = jnp.where(values < 0, without_noise(values), values)
    return jnp.where(kept, 1 / jnp.where(kept, values + damping, 1), 0)


@jax.custom_jvp
def log_determinant(matrix: Float[Array, "m m"], damping: Scalar) -> Scalar:
    """``log det (matrix + damping I)``, from Cholesky pivots if they can be trusted, else from eigenvalues.

    Each pivot has a small relative error; small eigenvalues have errors relative to the largest, after a scaling to a unit
    diagonal if there is no damping. Only the upper triangle is read. Derivatives are ``tr((matrix + damping I)^-1 d matrix)``.
    """
    size, eps = matrix.shape[0], jnp.finfo(matrix.dtype).eps
    diagonal = jnp.abs(jnp.diagonal(matrix)) + damping
    unit = unit_diagonal(diagonal)
    told = ~(damping <= eps * jnp.max(diagonal, initial=0.0))
    shares = jnp.diag(twice(damping, unit))
    scaled = unit[:, None] * matrix * unit[None, :] + shares
    factor = cholesky(scaled)
    # With damping a pivot may be as small as the rounding error of one entry; without, of the whole matrix.
    share = jnp.square(jnp.diagonal(factor)) / jnp.diagonal(scaled)
    well_posed = jnp.all(share > jnp.where(told, eps, size * eps))

    def by_eigenvalues() -> Scalar:
        # With damping keep the matrix's own units, where an eigenvalue of zero becomes the damping. A NaN counts as damping.
        damped = ~(damping <= 0)
        scale = jnp.where(damped, 1, unit)
        values = eigenvalues(scale[:, None] * matrix * scale[None, :] + jnp.where(damped, 0, shares))
        singular = jnp.where(values <= size * eps * jnp.max(values, initial=0.0), 0, values)
        return jnp.sum(jnp.log(jnp.where(damped, values + damping, singular))) - 2 * jnp.sum(jnp.log(scale))

    by_pivots: Scalar = cond(
        well_posed, lambda: 2 * jnp.sum(jnp.log(jnp.diagonal(factor))) - 2 * jnp.sum(jnp.log(unit)), by_eigenvalues
    )
    return by_pivots


@log_determinant.defjvp
def _log_determinant_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Scalar, Scalar]:
    inverse = _inverse_matrix(*primals)
    return log_determinant(*primals), jnp.sum(inverse * mirrored(tangents[0])) + jnp.trace(inverse) * tangents[1]


@jax.custom_jvp
def _inverse_matrix(matrix: Float[Array, "m m"], damping: Scalar) -> Float[Array, "m m"]:
    """``(matrix + damping I)^-1``; NaN if that matrix is singular."""
    found = invert(matrix, damping)
    inverse = jax.vmap(found.apply)(jnp.eye(matrix.shape[0], dtype=matrix.dtype))
    return jnp.where(found.rank == matrix.shape[0], inverse, jnp.nan)


@_inverse_matrix.defjvp
def _inverse_matrix_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    inverse, change = _inverse_matrix(*primals), mirrored(tangents[0])
    return inverse, -matmul(inverse, matmul(change + tangents[1] * jnp.eye(change.shape[0], dtype=change.dtype), inverse))
