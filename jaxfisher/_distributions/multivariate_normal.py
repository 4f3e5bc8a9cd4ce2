"""The normal distribution of a vector."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from jaxfisher._distributions.base import Distribution, family, of_plain_bits, one_of
from jaxfisher._distributions.excess import excess_over_log
from jaxfisher._distributions.stable import working_dtype
from jaxfisher._linalg import matmul
from jaxfisher._tree import HIGHEST
from jaxfisher._values import check_definite

_HALF_LOG_TWO_PI = 0.9189385332046727


@family
class MultivariateNormal(Distribution):
    r"""Normal distribution of a vector with mean ``loc`` and covariance ``L L^T``, ``L`` the lower triangle of ``scale_tril``.

    .. math:: \log p(x) = -\tfrac12 \|L^{-1}(x - \mu)\|^2 - \sum_i \log L_{ii} - \tfrac d2 \log 2\pi.

    The Fisher has no block between ``loc`` and ``scale_tril``. With ``A = L^{-1} dL`` for a lower triangular tangent,

    .. math:: F(d\mu, d\mu) = \|L^{-1} d\mu\|^2, \qquad F(dL, dL) = \sum_{i > j} A_{ij}^2 + 2 \sum_i A_{ii}^2.

    Entries above the diagonal of ``scale_tril`` are ignored everywhere; the Fisher is zero there.

    Args:
        loc: the mean, shape ``[*batch, d]``, in the units of the target.
        scale_tril: the factor of the covariance, shape ``[*batch, d, d]``, in the units of the target, with a positive
            diagonal.

    ``MultivariateNormal(loc, covariance=C)`` takes the covariance itself instead, of the same shape, in the square of those
    units; if it is known not to be positive definite, that is an error, and if unknown, ``scale_tril`` is NaN.

    The fields move in ``d + d (d + 1)/2`` directions, so an example has as many rows in the exact Fisher. For a vector of
    independent entries use a `jaxfisher.Normal` whose fields are vectors: an example then has ``2 d`` rows.

    Raises:
        ValueError: the batch shapes do not broadcast together; ``scale_tril`` is not square, or not of the size of ``loc``; its
            diagonal is known not to be above zero (if unknown, it gives NaN); ``covariance`` is known not to be one.
        TypeError: a complex field; both of ``scale_tril`` and ``covariance``, or neither.

    Reference: Malago and Pistone, Information geometry of the Gaussian distribution in view of stochastic optimization
    (FOGA 2015), section 3, in the coordinates of the Cholesky factor.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> p = jf.MultivariateNormal(jnp.zeros(2), jnp.eye(2))
    >>> print(jnp.round(jnp.diagonal(p.fisher_matrix()), 4))
    [1. 1. 2. 0. 1. 2.]
    """

    loc: Float[Array, "*batch d"]
    scale_tril: Float[Array, "*batch d d"]

    field_ndims = (1, 2)
    event_ndim = 1
    positive = ("scale_tril",)

    def __init__(self, loc: ArrayLike, scale_tril: ArrayLike | None = None, *, covariance: ArrayLike | None = None) -> None:
        check_definite("MultivariateNormal: `covariance`", covariance)
        given = {"scale_tril": scale_tril, "covariance": covariance}
        object.__setattr__(self, "loc", loc)
        object.__setattr__(self, "scale_tril", one_of("MultivariateNormal", given, _cholesky))
        self.__post_init__()

    def _check_fields(self) -> None:
        rows, columns = self.scale_tril.shape[-2:]
        size = self.loc.shape[-1]
        if (rows, columns) != (size, size):
            raise ValueError(
                f"MultivariateNormal: `loc` has shape {self.loc.shape} and `scale_tril` {self.scale_tril.shape}. "
                f"Give `scale_tril` of shape [*batch, {size}, {size}]: the lower Cholesky factor of the covariance."
            )

    @property
    def mean(self) -> Float[Array, "*batch d"]:
        return self.loc

    @property
    def variance(self) -> Float[Array, "*batch d"]:
        return jnp.sum(jnp.square(self._factor), axis=-1)

    @property
    def covariance(self) -> Float[Array, "*batch d d"]:
        """``L L^T``, shape ``[*batch, d, d]``, in the square of the units of the target."""
        return matmul(self._factor, self._factor.swapaxes(-1, -2))

    @property
    def mode(self) -> Float[Array, "*batch d"]:
        return self.loc

    def entropy(self) -> Float[Array, "*batch"]:
        """``sum_i log L_ii + d log(2 pi e)/2``."""
        return jnp.sum(jnp.log(_diagonal(self.scale_tril)), axis=-1) + self.loc.shape[-1] * (_HALF_LOG_TWO_PI + 0.5)

    def log_prob(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
        x = jnp.asarray(x)
        if x.shape[-1:] != self.loc.shape[-1:]:
            raise ValueError(
                f"MultivariateNormal.log_prob: `x` has shape {x.shape}, but draws have shape {self.loc.shape}. "
                f"Give vectors of length {self.loc.shape[-1]} on the last axis."
            )
        z = self._whiten(x - self.loc)
        log_det = jnp.sum(jnp.log(_diagonal(self.scale_tril)), axis=-1)
        return -0.5 * jnp.sum(jnp.square(z), axis=-1) - log_det - self.loc.shape[-1] * _HALF_LOG_TWO_PI

    @of_plain_bits
    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*shape_batch d"]:
        noise = jax.random.normal(key, shape + self.loc.shape, self.loc.dtype)
        shift = jnp.einsum("...ij,...j->...i", self._factor, noise, precision=HIGHEST)
        return jnp.broadcast_to(self.loc, shift.shape) + shift

    def kl(self, other: MultivariateNormal) -> Float[Array, "*batch"]:
        """``(|L'^-1 L|^2 - d + |L'^-1 (m - m')|^2) / 2 + sum_i log(L'_ii / L_ii)``.

        With ``L'^-1 L = I + E`` this is ``(|E|^2 + |L'^-1 (m - m')|^2) / 2`` plus the divergences ``e - log(1 + e)`` of the
        diagonal: a sum of terms that are never negative, and all zero for equal arguments.
        """
        other = self._same_family(other)
        batch = jnp.broadcast_shapes(self.batch_shape, other.batch_shape)
        size = self.loc.shape[-1]
        # Both right-hand sides in one solve: the columns of L - L', then m - m'.
        sides = jnp.concatenate(
            [
                jnp.broadcast_to(jnp.tril(self.scale_tril - other.scale_tril), (*batch, size, size)),
                jnp.broadcast_to((self.loc - other.loc)[..., None], (*batch, size, 1)),
            ],
            axis=-1,
        )
        solved = _solve(other.scale_tril, sides)
        scales = excess_over_log(_diagonal(self.scale_tril), _diagonal(other.scale_tril))
        return 0.5 * jnp.sum(jnp.square(solved), axis=(-2, -1)) + jnp.sum(scales, axis=-1)

    def fisher_noise(self) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch triangle"]]:
        """Zeros for ``loc``, and for the entries of the lower triangle, row by row; the upper triangle has no noise."""
        size = self.loc.shape[-1]
        return jnp.zeros_like(self.loc), jnp.zeros((*self.batch_shape, size * (size + 1) // 2), self.loc.dtype)

    def fisher_sqrt_mv(self, u: tuple[Float[Array, "*batch d"], Float[Array, "*batch triangle"]]) -> MultivariateNormal:
        # F(dL, dL) = |W o (L^-1 dL)|^2 with W = sqrt 2 on the diagonal and 1 below. B is the transpose of dL -> W o (L^-1 dL).
        along, triangle = u
        rows, columns = np.tril_indices(self.loc.shape[-1])
        weight = jnp.asarray(np.where(rows == columns, 2**0.5, 1.0), triangle.dtype)
        entries = triangle * jnp.broadcast_to(weight, triangle.shape)
        weighted = jnp.zeros_like(self.scale_tril).at[..., rows, columns].set(entries, unique_indices=True)
        # Two separate solves, so that dataflow analysis sees which part of the noise moves which field.
        loc = _solve(self.scale_tril, along[..., None], transpose=True)[..., 0]
        return self._make(loc, jnp.tril(_solve(self.scale_tril, weighted, transpose=True)))

    @property
    def _factor(self) -> Float[Array, "*batch d d"]:
        """The lower triangle of ``scale_tril``, which is all of it that counts."""
        return jnp.tril(self.scale_tril)

    def _whiten(self, residual: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return _solve(self.scale_tril, residual[..., None])[..., 0]


def _cholesky(covariance: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    factor: Array = jnp.linalg.cholesky(covariance.astype(working_dtype(covariance.dtype)))
    return factor.astype(covariance.dtype)


def _diagonal(matrix: Float[Array, "*batch d d"]) -> Float[Array, "*batch d"]:
    return jnp.diagonal(matrix, axis1=-2, axis2=-1)


def _solve(
    factor: Float[Array, "*batch d d"], sides: Float[Array, "*batch d k"], transpose: bool = False
) -> Float[Array, "*batch d k"]:
    """``L^-1`` (or ``L^-T``) times the columns of ``sides``; reads the lower triangle of ``factor`` alone."""
    wide = working_dtype(factor.dtype)
    batch = jnp.broadcast_shapes(factor.shape[:-2], sides.shape[:-2])
    solved = jax.lax.linalg.triangular_solve(
        jnp.broadcast_to(factor, batch + factor.shape[-2:]).astype(wide),
        jnp.broadcast_to(sides, batch + sides.shape[-2:]).astype(wide),
        left_side=True,
        lower=True,
        transpose_a=transpose,
    )
    narrow: Array = solved.astype(factor.dtype)
    return narrow
