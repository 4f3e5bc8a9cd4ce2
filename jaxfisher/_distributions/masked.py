"""A batch of independent distributions of which only some members count."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped

from jaxfisher._distributions.base import Distribution, family
from jaxfisher._distributions.bernoulli import Bernoulli
from jaxfisher._distributions.categorical import Categorical
from jaxfisher._distributions.foreign import Foreign, as_distribution
from jaxfisher._distributions.joint import Joint
from jaxfisher._distributions.negative_binomial import NegativeBinomial
from jaxfisher._distributions.poisson import Poisson
from jaxfisher._distributions.root import Root
from jaxfisher._linalg import matmul

_COUNTS = (Bernoulli, Categorical, NegativeBinomial, Poisson)
"""Families for which zero is an outcome, and the mean need not be one."""


@family
class Masked(Distribution):
    r"""The members of a batch of independent distributions for which a mask is true, as for sequences of unequal lengths.

    .. math:: \log p(x) = \sum_{t} m_t \log p_t(x_t), \qquad F = \mathrm{diag}(m_t F_t).

    Log-densities, KL divergences, entropies and Fishers are those of the distribution where the mask is true, and zero where it
    is false. The model's outputs there never count: parameters and targets that are NaN or infinite do not change values or
    derivatives, since they are replaced before any computation. Draws, means, variances and modes hold a fixed outcome there.
    Derivatives inside the model are not protected: an input that is NaN turns a cotangent of zero into NaN, so replace inputs
    that may be NaN before the model sees them, ``jnp.where(mask, x, 0)``.

    Args:
        distribution: one of the library's families, or one of another library with a counterpart here, with a batch shape.
        mask: booleans, of a shape that broadcasts to the batch shape.

    Raises:
        TypeError: ``distribution`` is no distribution, a `jaxfisher.Joint`, or a foreign one without a counterpart; ``mask`` is
            not boolean.
        ValueError: ``mask`` does not broadcast to the batch shape.

    Reference: Martens, New insights and perspectives on the natural gradient method (JMLR 2020), section 9: the Fisher of a
    product of independent distributions is block-diagonal, and a block that is left out is zero.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> p = jf.Masked(jf.Normal(jnp.array([0.0, jnp.nan]), 1.0), jnp.array([True, False]))
    >>> print(p.log_prob(jnp.array([1.0, 5.0])).round(4), p.fisher_mv(p).distribution.loc)
    [-1.4189  0.    ] [0. 0.]
    """

    distribution: Any
    mask: Bool[Array, "*batch"]

    field_ndims = ()
    event_ndim = 0

    def __post_init__(self) -> None:
        distribution = as_distribution(self.distribution)
        if isinstance(distribution, Joint):
            raise TypeError(
                f"Masked: `distribution` is {distribution}; expected one family. Mask its parts, "
                'jf.Joint({"label": jf.Masked(p, mask), ...}).'
            )
        if isinstance(distribution, Foreign | Masked):
            raise TypeError(
                f"Masked: `distribution` is {distribution}; expected one of the library's families, such as "
                "jf.Categorical(logits=...), whose parts it can leave out."
            )
        mask = jnp.asarray(self.mask)
        if mask.dtype != jnp.bool_:
            raise TypeError(f"Masked: `mask` has dtype {mask.dtype}; expected booleans, such as position < length.")
        batch = distribution.batch_shape
        if mask.ndim > len(batch) or jnp.broadcast_shapes(mask.shape, batch) != batch:
            raise ValueError(
                f"Masked: `mask` has shape {mask.shape}, and the distribution a batch of shape {batch}; expected one that "
                "broadcasts to the batch shape, a boolean for each member."
            )
        object.__setattr__(self, "distribution", distribution)
        object.__setattr__(self, "mask", jnp.broadcast_to(mask, batch))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.mask.shape

    @property
    def event_shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.distribution.event_shape
        return shape

    @property
    def fisher_source(self) -> str:
        source: str = self.distribution.fisher_source
        return source

    def _where(self, value: Array, other: Any) -> Array:
        """``value`` where the mask is true, else ``other``, for arrays with batch axes followed by axes of their own."""
        mask = self.mask.reshape(self.mask.shape + (1,) * (value.ndim - self.mask.ndim))
        return jnp.where(mask, value, jnp.asarray(other, value.dtype))

    def _with(self, tangent: Any) -> Masked:
        """A pytree like this one, with a tangent in the place of the distribution's fields."""
        made: Masked = jax.tree.unflatten(jax.tree.structure(self), [*jax.tree.leaves(tangent), self.mask])
        return made

    def _kept(self, tree: Any) -> Any:
        """The tree with zeros where the mask is false, in every leaf."""
        return jax.tree.map(lambda leaf: self._where(leaf, 0), tree)

    def _clean(self, distribution: Any) -> Any:
        """A distribution with harmless parameters where the mask is false, so that no NaN arises there."""

        def cleaned(leaf: Array, ndim: int) -> Array:
            # In every family all moments are finite at a parameter of three; matrices become the identity.
            return self._where(leaf, jnp.eye(leaf.shape[-1], dtype=leaf.dtype) if ndim == 2 else 3)

        leaves, treedef = jax.tree.flatten(distribution)
        pairs = zip(leaves, distribution.field_ndims, strict=True)
        return jax.tree.unflatten(treedef, [cleaned(leaf, ndim) for leaf, ndim in pairs])

    @property
    def _inside(self) -> Any:
        return self._clean(self.distribution)

    def _outcome(self, inside: Any) -> Array:
        """A possible outcome of every member of a clean distribution."""
        mean: Array = inside.mean
        return jnp.zeros_like(mean) if isinstance(inside, _COUNTS) else mean

    def _filled(self, value: Shaped[Array, "*shape_batch_event"], inside: Any) -> Array:
        """``value`` where the mask is true, and the fixed outcome elsewhere."""
        mask = self.mask.reshape(self.mask.shape + (1,) * len(self.event_shape))
        return jnp.where(mask, value, self._outcome(inside).astype(value.dtype))

    @property
    def mean(self) -> Float[Array, "*batch_and_event"]:
        inside = self._inside
        return self._filled(inside.mean, inside)

    @property
    def variance(self) -> Float[Array, "*batch_and_event"]:
        return self._where(self._inside.variance, 0)

    @property
    def mode(self) -> Shaped[Array, "*batch_and_event"]:
        inside = self._inside
        return self._filled(inside.mode, inside)

    def entropy(self) -> Float[Array, "*batch"]:
        """The entropies of the members whose mask is true, zero elsewhere."""
        return self._where(self._inside.entropy(), 0)

    def log_prob(self, x: Shaped[Array, "*batch_and_event"]) -> Float[Array, "*batch"]:
        inside = self._inside
        value = inside.log_prob(self._filled(jnp.asarray(x), inside))
        return jnp.where(self.mask, value, jnp.zeros_like(value))

    @property
    def _takes_any_key(self) -> bool:
        return self._inside._takes_any_key

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Shaped[Array, "*shape_batch_event"]:
        inside = self._inside
        return self._filled(inside.sample(key, shape), inside)

    def kl(self, other: Masked) -> Float[Array, "*batch"]:
        """The divergences of the members whose mask is true here, zero elsewhere."""
        other = self._same_family(other)
        return self._where(self._inside.kl(self._clean(other.distribution)), 0)

    def fisher_noise(self) -> Any:
        return self._inside.fisher_noise()

    def fisher_sqrt_mv(self, u: Any) -> Masked:
        return self._with(self._kept(self._inside.fisher_sqrt_mv(u)))

    def fisher_root(self, moving: tuple[bool, ...]) -> tuple[Any, Root]:
        noise, root = self._inside.fisher_root(moving)
        return noise, lambda u: [self._where(leaf, 0) for leaf in root(u)]

    def fisher_mv(self, v: Masked) -> Masked:
        return self._with(self._kept(self._inside.fisher_mv(self._kept(v.distribution))))

    def fisher_matrix(self) -> Float[Array, "fields fields"]:
        noise, unravel = ravel_pytree(self.fisher_noise())
        column = lambda u: ravel_pytree(self.fisher_sqrt_mv(unravel(u)).distribution)[0]  # noqa: E731
        columns = jax.vmap(column)(jnp.eye(noise.size, dtype=noise.dtype))
        return matmul(columns.T, columns)

    def _same_family(self, other: Any) -> Masked:
        known = super()._same_family(other)
        self.distribution._same_family(known.distribution)
        if known.batch_shape != self.batch_shape:
            raise ValueError(f"Masked.kl: the two have batches of shapes {self.batch_shape} and {known.batch_shape}.")
        return known

    def _own_shapes(self) -> tuple[tuple[int, ...], ...]:
        shapes: tuple[tuple[int, ...], ...] = self.distribution._own_shapes()
        return shapes
