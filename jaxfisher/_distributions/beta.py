"""The beta distribution: the Dirichlet of two classes, seen through the first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxfisher._distributions.base import Distribution, family
from jaxfisher._distributions.dirichlet import dirichlet_entropy, divergence, fisher_root, log_density
from jaxfisher._distributions.special import aligned
from jaxfisher._distributions.stable import ratio


@family
class Beta(Distribution):
    r"""Beta distribution on ``0 < x < 1`` with concentrations ``a > 0`` of ``x`` and ``b > 0`` of ``1 - x``.

    .. math:: \log p(x) = (a - 1)\log x + (b - 1)\log(1 - x) - \log B(a, b), \qquad
        F(a, b) = \mathrm{diag}(\psi'(a), \psi'(b)) - \psi'(a + b)\, 1 1^T.

    ``log_prob`` is ``-inf`` outside ``[0, 1]``; at the ends it is the limit from within.

    Numbers have digits over the range that `jaxfisher.Gamma` states.

    Args:
        a: concentration of ``x``, shape ``[*batch]``, no unit, above zero.
        b: concentration of ``1 - x``, shape ``[*batch]``, no unit, above zero.

    Raises:
        ValueError: the shapes do not broadcast together; a field is known not to be above zero (if unknown, it gives NaN).
        TypeError: a complex field.

    Reference: Johnson, Kotz and Balakrishnan, Continuous Univariate Distributions, volume 2 (1995), chapter 25.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> p = jf.Beta(2.0, 2.0)
    >>> print(round(float(jnp.exp(p.log_prob(0.5))), 4), float(p.mean))
    1.5 0.5
    """

    a: Float[Array, "*batch"]
    b: Float[Array, "*batch"]

    field_ndims = (0, 0)
    event_ndim = 0
    positive = ("a", "b")

    @property
    def mean(self) -> Float[Array, "*batch"]:
        a, b = aligned(self.a, self.b)
        return ratio(a, a + b).astype(self.a.dtype)

    @property
    def variance(self) -> Float[Array, "*batch"]:
        a, b = aligned(self.a, self.b)
        mean = ratio(a, a + b)
        return (mean * ratio(b, a + b) / (a + b + 1)).astype(self.a.dtype)

    @property
    def mode(self) -> Float[Array, "*batch"]:
        """``(a - 1)/(a + b - 2)``, or an end of the interval if one concentration is at most one; NaN if both are."""
        a, b = aligned(self.a, self.b)
        inside, alone = (a > 1) & (b > 1), (a > 1) != (b > 1)
        peak = ratio(jnp.where(inside, a - 1, 1), jnp.where(inside, a + b - 2, 1))
        return jnp.where(inside, peak, jnp.where(alone, jnp.where(a > 1, 1.0, 0.0), jnp.nan)).astype(self.a.dtype)

    def entropy(self) -> Float[Array, "*batch"]:
        """The entropy of the Dirichlet distribution with concentrations ``a`` and ``b``."""
        a, b = aligned(self.a, self.b)
        return dirichlet_entropy(jnp.stack([a, b], -1)).astype(self.a.dtype)

    def log_prob(self, x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        a, b, x = aligned(self.a, self.b, jnp.asarray(x))
        return log_density(jnp.stack([a, b], -1), jnp.stack([x, 1 - x], -1)).astype(self.a.dtype)

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*shape_and_batch"]:
        size = shape + self.batch_shape
        a, b = (jnp.broadcast_to(field, size) for field in aligned(self.a, self.b))
        return jax.random.beta(key, a, b, dtype=a.dtype).astype(self.a.dtype)

    def kl(self, other: Beta) -> Float[Array, "*batch"]:
        """The divergence between the two Dirichlet distributions."""
        other = self._same_family(other)
        a, b, c, d = aligned(self.a, self.b, other.a, other.b)
        return divergence(jnp.stack([a, b], -1), jnp.stack([c, d], -1)).astype(self.a.dtype)

    def fisher_sqrt_mv(self, u: Beta) -> Beta:
        a, b, u_a, u_b = aligned(self.a, self.b, u.a, u.b)
        fields = fisher_root(jnp.stack([a, b], -1), jnp.stack([u_a, u_b], -1))
        return self._make(fields[..., 0].astype(self.a.dtype), fields[..., 1].astype(self.a.dtype))
