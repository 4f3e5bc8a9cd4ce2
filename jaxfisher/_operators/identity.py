"""A multiple of the identity, and a Fisher with one added: an isotropic Gaussian prior's precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._engine import Basis
from jaxfisher._inverse import Factorise
from jaxfisher._operators.base import Operator
from jaxfisher._operators.diagonal import Diagonal
from jaxfisher._operators.inverted import Inverted
from jaxfisher._operators.provenance import Provenance
from jaxfisher._operators.spectral import Spectral
from jaxfisher._tree import ParamSpec, param_spec
from jaxfisher._values import nonnegative


@partial(jax.tree_util.register_dataclass, data_fields=("scale",), meta_fields=("spec", "provenance"))
@dataclasses.dataclass(frozen=True, repr=False)
class ScaledIdentity(Spectral):
    """``scale I``."""

    scale: Scalar
    spec: ParamSpec
    provenance: Provenance

    form = "scaled identity"
    averages = True
    held = ("scale",)
    takes_sums = 2

    @property
    def stack(self) -> tuple[int, ...]:
        return jnp.shape(self.scale)

    def as_matrix(self) -> Float[Array, "p p"]:
        return self.scale * jnp.eye(self.size, dtype=self.spec.dtype)

    def diagonal(self) -> Any:
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, 1) * self.scale, self.spec.zeros())

    def along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        return basis.of_diagonal(self.diagonal())

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> ScaledIdentity:
        return dataclasses.replace(self, spec=self.spec.restrict(keep, treedef))

    def rescaled(self, factors: Sequence[Scalar]) -> Diagonal:
        return Diagonal(self.diagonal(), self.spec, self.provenance).rescaled(factors)

    def _scaled(self, factor: Any) -> ScaledIdentity:
        return dataclasses.replace(self, scale=factor * self.scale, provenance=self.provenance.times())

    def _plus(self, other: Operator) -> Operator:
        if isinstance(other, ScaledIdentity):
            return ScaledIdentity(self.scale + other.scale, self.spec, self.provenance.plus(other.provenance))
        provenance = other.provenance.plus(self.provenance)
        if isinstance(other, Shifted):
            return Shifted(other.base, other.shift + self.scale, provenance)
        return Shifted(other, self.scale, provenance)

    def _eigenvalues(self) -> list[tuple[Array, int]]:
        return [(self.scale[None], self.size)]

    def _apply(self, function: Callable[[Array], Array], v: Any) -> Any:
        return jax.tree.map(lambda leaf: function(self.scale) * leaf, v)


@partial(jax.tree_util.register_dataclass, data_fields=("base", "shift"), meta_fields=("provenance",))
@dataclasses.dataclass(frozen=True, repr=False)
class Shifted(Operator):
    """``F + shift I``, in the form of F: the shift is a damping that is always there."""

    base: Operator
    shift: Scalar
    provenance: Provenance

    takes_sums = 1

    @property
    def spec(self) -> ParamSpec:  # type: ignore[override]
        """The parameters' spec."""
        return self.base.spec

    @property
    def form(self) -> str:  # type: ignore[override]
        """The form of what is shifted."""
        return f"{self.base.form} + scaled identity"

    @property
    def averages(self) -> bool:  # type: ignore[override]
        """Whether what is shifted averages."""
        return self.base.averages

    @property
    def arrays(self) -> tuple[Any, ...]:
        return self.base.arrays, self.shift

    def with_arrays(self, arrays: tuple[Any, ...]) -> Shifted:
        return dataclasses.replace(self, base=self.base.with_arrays(arrays[0]), shift=arrays[1])

    @property
    def viewed(self) -> Shifted:
        return dataclasses.replace(self, base=self.base.viewed)

    def pieces(self) -> tuple[tuple[tuple[int, ...], Operator], ...]:
        everything = tuple(range(len(self.spec.paths)))
        return (*self.base.pieces(), (everything, ScaledIdentity(self.shift, self.spec, self.provenance)))

    def factorised(self) -> Shifted:
        return dataclasses.replace(self, base=self.base.factorised())

    @property
    def stack(self) -> tuple[int, ...]:
        return self.base.stack or jnp.shape(self.shift)

    def as_matrix(self) -> Float[Array, "p p"]:
        return self.base.as_matrix() + self.shift * jnp.eye(self.size, dtype=self.spec.dtype)

    def diagonal(self) -> Any:
        return jax.tree.map(lambda leaf: leaf + self.shift, self.base.diagonal())

    def linearised(self) -> Callable[[Any], Any]:
        product = self.base.linearised()
        return lambda v: jax.tree.map(lambda f, x: f + self.shift * x, product(v), v)

    def trace(self) -> Scalar:
        return self.base.trace() + self.size * self.shift

    def eigvalsh(self) -> Float[Array, " p"]:
        return self.base.eigvalsh() + self.shift

    def frobenius_norm(self) -> Scalar:
        both = jnp.stack([self.base.frobenius_norm(), self.size**0.5 * self.shift])
        largest = jnp.maximum(jnp.max(both), jnp.finfo(both.dtype).tiny)
        cross = 2 * (self.base.trace() / largest) * (self.shift / largest)
        return largest * jnp.sqrt(jnp.sum(jnp.square(both / largest)) + cross)

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> Shifted:
        return dataclasses.replace(self, base=self.base.restrict(keep, treedef))

    def _scaled(self, factor: Any) -> Shifted:
        return Shifted(self.base._scaled(factor), factor * self.shift, self.provenance.times())

    def _plus(self, other: Operator) -> Operator:
        provenance = self.provenance.plus(other.provenance)
        if isinstance(other, Shifted):
            return Shifted(self.base._plus(other.base), self.shift + other.shift, provenance)
        return Shifted(self.base._plus(other), self.shift, provenance)

    def _inverse(self, damping: Scalar) -> Inverted:
        return self.base._inverse(damping + self.shift)

    def inverses(self, largest: Scalar, factorise: Factorise) -> Callable[[Scalar], Inverted]:
        base = self.base.inverses(largest + self.shift, factorise)
        return lambda damping: base(damping + self.shift)

    def _inverse_by_leaf(self, dampings: tuple[Scalar, ...]) -> Inverted:
        return self.base._inverse_by_leaf(tuple(damping + self.shift for damping in dampings))

    def _logdet(self, damping: Scalar) -> Scalar:
        return self.base._logdet(damping + self.shift)

    def _logdet_by_leaf(self, dampings: tuple[Scalar, ...]) -> Scalar:
        return self.base._logdet_by_leaf(tuple(damping + self.shift for damping in dampings))

    def _power_mv(self, v: Any, power: Scalar, damping: Scalar) -> Any:
        return self.base._power_mv(v, power, damping + self.shift)

    def _small_matrix(self, method: str) -> Float[Array, "p p"]:
        return self.base._small_matrix(method) + self.shift * jnp.eye(self.size, dtype=self.spec.dtype)


def scaled_identity(like: Operator | chex.ArrayTree, scale: chex.Numeric) -> ScaledIdentity:
    r"""``scale I`` as an operator, to add to a Fisher: the precision of an isotropic Gaussian prior, or a ridge.

    ``F + jf.scaled_identity(F, c)`` keeps the form of F: it is solved, factored and drawn from as F is with a damping of ``c``.
    A Fisher is a mean over examples, so a prior of precision ``1/s^2`` over n examples is ``c = 1 / (n s^2)``.

    Args:
        like: an operator over the parameters, or the parameters.
        scale: ``>= 0``, in the units of F.

    Raises:
        ValueError: a negative ``scale``.
        TypeError: a parameter that is not a real floating array.

    Reference: MacKay, A practical Bayesian framework for backpropagation networks (Neural Computation 1992), section 2.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.exact_fisher(lambda w, x: jf.Bernoulli(logits=w * x))(0.0, jnp.array([1.0, 3.0]))
    >>> F + jf.scaled_identity(F, 0.75)
    Fisher((exact, mean over 2) + (scaled identity), params 1, exact as scores + scaled identity)
    >>> print((F + jf.scaled_identity(F, 0.75)).solve(1.0, damping=0.0))  # 1 / (5/4 + 3/4)
    0.5
    """
    spec = like.spec if isinstance(like, Operator) else param_spec(like)
    return ScaledIdentity(nonnegative("scale", scale, spec.dtype), spec, Provenance("scaled identity", 0))


def relative_damping(fisher: Operator, share: chex.Numeric) -> Scalar:
    r"""A damping relative to the mean eigenvalue: ``share * trace(F) / p``, absolute, in the units of F.

    Args:
        fisher: any operator that knows its trace.
        share: ``>= 0``.

    Raises:
        TypeError: ``fisher`` is not an operator.
        ValueError: a negative ``share``.

    Reference: Becca and Sorella, Quantum Monte Carlo approaches for correlated systems (2017), section 6.4, for a damping in
    the units of F.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.exact_fisher(lambda w, x: jf.Bernoulli(logits=w * x))(0.0, jnp.array([1.0, 3.0]))
    >>> print(jf.relative_damping(F, 0.1))
    0.125
    """
    if not isinstance(fisher, Operator):
        raise TypeError(f"relative_damping: expected a Fisher operator, got {fisher!r}.")
    return nonnegative("share", share, fisher.spec.dtype) * fisher.trace() / fisher.size
