"""Diagnostics of a Fisher: its spectrum, and its effective dimension at a damping."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Scalar

from jaxfisher._operators.operator import Operator, as_operator
from jaxfisher._values import check_number, is_known, nonnegative


def effective_dimension(fisher: Operator, damping: chex.Numeric) -> Scalar:
    r"""The number of directions that the Fisher determines better than the damping does.

    .. math:: \operatorname{tr} F (F + \delta I)^{-1} = \sum_k \frac{\lambda_k}{\lambda_k + \delta}.

    It lies between zero and the rank. With ``damping = precision / n`` it is MacKay's number of well-determined parameters
    under a prior of that precision; for linear regression it is the effective degrees of freedom of ridge.

    Args:
        fisher: any operator that has eigenvalues. For many dampings use `jax.vmap`: the eigenvalues are computed once.
        damping: one number of at least zero, in the units of F. If the dtype cannot tell it from zero beside F, only the
            largest eigenvalues count, as many as the rank of F; at zero the result is the rank.

    Returns:
        A scalar in the statistics dtype, without units.

    Raises:
        TypeError: ``fisher`` is not an operator, ``damping`` not one real number.
        ValueError: a negative damping; a Fisher too large for its eigenvalues.

    Reference: MacKay, Bayesian interpolation (Neural Computation 1992), section 4.2; Hastie, Tibshirani and Friedman, The
    Elements of Statistical Learning (2009), equation 3.50.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(p * x, 1.0)
    >>> F = jf.exact_fisher(model)(jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 1.0]]))  # eigenvalues 2 and 1/2
    >>> print(round(float(jf.effective_dimension(F, 0.5)), 4))  # 2 / 2.5 + 0.5 / 1
    1.3
    """
    fisher = as_operator(fisher, "effective_dimension")
    damping = nonnegative("damping", damping, fisher.spec.dtype)
    values = fisher.eigvalsh()
    values = values[jnp.argsort(-jnp.abs(values))]
    told = damping > jnp.finfo(values.dtype).eps * jnp.abs(values[0])
    kept = told | (jnp.arange(values.size, dtype=jnp.int32) < fisher.rank())
    # Not lambda / (lambda + damping), whose denominator may overflow. A kept eigenvalue that is zero, lost in the rounding of
    # others, counts as one at zero damping. A zero of its own has a second derivative.
    known, one = values != 0, (damping == 0).astype(values.dtype)
    zero = jnp.where(told, values / jnp.where(told, damping, 1), one)
    share = jnp.where(known, 1 / (1 + damping / jnp.where(known, values, 1)), zero)
    return jnp.sum(jnp.where(kept, share, 0))


class Spectrum(NamedTuple):
    """The eigenvalues of a Fisher, and numbers derived from them.

    Attributes:
        eigenvalues: descending, shape ``[p]``, in the units of F.
        rank: the number of eigenvalues that are not zero to rounding, as `Operator.rank` decides it.
        condition_number: the condition number of F on its range: the largest over the smallest of ``rank`` eigenvalues.
            Infinite if the smallest is lost in the rounding of the largest; 1 if the Fisher is zero.
        participation_ratio: ``(sum lambda)^2 / sum lambda^2``, the effective number of eigenvalues, between 1 and the rank;
            0 if the Fisher is zero.
    """

    eigenvalues: Float[Array, " p"]
    rank: Int[Array, ""]
    condition_number: Float[Array, ""]
    participation_ratio: Float[Array, ""]

    def leading(self, share: chex.Numeric) -> Int[Array, ""]:
        """The number of largest eigenvalues that make up this share of the trace, from 0 to 1."""
        check_number("share", share)
        if is_known(share) and not 0 <= float(share) <= 1:
            raise ValueError(f"`share` is {share}; expected a number from 0 to 1.")
        running = jnp.cumsum(self.eigenvalues / jnp.maximum(self.eigenvalues[0], jnp.finfo(self.eigenvalues.dtype).tiny))
        needed = jnp.clip(jnp.asarray(share, running.dtype), 0, 1) * running[-1]
        return jnp.where(needed > 0, jnp.sum(running < needed) + 1, 0).astype(jnp.int32)

    def __repr__(self) -> str:
        if isinstance(self.rank, jax.core.Tracer) or jnp.ndim(self.rank):
            return f"Spectrum(eigenvalues of shape {jnp.shape(self.eigenvalues)})"
        return (
            f"Spectrum(params {self.eigenvalues.size:,}, rank {self.rank:,}, largest {self.eigenvalues[0]:.3g}, "
            f"condition number {self.condition_number:.3g}, participation ratio {self.participation_ratio:.3g})"
        )


def spectrum(fisher: Operator) -> Spectrum:
    r"""The eigenvalues of a Fisher, largest first, with its rank, condition number and participation ratio.

    .. math:: \lambda_1 \ge \dots \ge \lambda_p, \qquad \kappa = \lambda_1 / \lambda_r, \qquad
        (\textstyle\sum \lambda)^2 / \sum \lambda^2.

    Args:
        fisher: any operator that has eigenvalues; for one that is too large, see `jaxfisher.spectral_density`.

    Returns:
        A `Spectrum`, in the statistics dtype and the units of F; it crosses ``jit``.

    Raises:
        TypeError: ``fisher`` is not an operator.
        ValueError: a Fisher too large for its eigenvalues.

    Reference: Karakida, Akaho and Amari, Universal statistics of Fisher information in deep neural networks (AISTATS 2019),
    section 3, for the spectra of networks.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(jnp.sum(p * x), 1.0)
    >>> jf.spectrum(jf.exact_fisher(model)(jnp.zeros(3), jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])))
    Spectrum(params 3, rank 2, largest 2, condition number 4, participation ratio 1.47)
    """
    fisher = as_operator(fisher, "spectrum")
    values, rank = jnp.flip(fisher.eigvalsh()), fisher.rank()
    sizes = -jnp.sort(-jnp.abs(values))
    smallest = sizes[jnp.maximum(rank - 1, 0)]
    # Work in units of the largest, so that no square overflows.
    unit = values / jnp.where(sizes[0] > 0, sizes[0], 1)
    squares = jnp.sum(jnp.square(unit))
    ratio = jnp.square(jnp.sum(unit)) / jnp.where(squares == 0, 1, squares)
    return Spectrum(values, rank, jnp.where(sizes[0] == 0, 1, sizes[0] / smallest), ratio)
