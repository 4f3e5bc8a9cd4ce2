"""Multiples of the identity, alone and added to a Fisher, such as the precision of an isotropic Gaussian prior."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._engine import Basis
from jaxfisher._operators.dense import by_entry
from jaxfisher._operators.diagonal import Diagonal
from jaxfisher._operators.form import Form
from jaxfisher._operators.inverted import Inverted
from jaxfisher._operators.operator import Operator
from jaxfisher._operators.spectral import Spectral
from jaxfisher._operators.sum import added
from jaxfisher._provenance import Provenance
from jaxfisher._pytree import array_fields
from jaxfisher._system import Factorise
from jaxfisher._tree import ParamSpec, param_spec, products
from jaxfisher._values import nonnegative


@array_fields("scale", repr=False)
class ScaledIdentity(Spectral):
    """``scale I``."""

    scale: Scalar
    spec: ParamSpec

    name = "scaled identity"
    averages = True
    halved = True

    @property
    def stack(self) -> tuple[int, ...]:
        return jnp.shape(self.scale)

    def as_matrix(self) -> Float[Array, "p p"]:
        return self.scale * jnp.eye(self.spec.size, dtype=self.spec.dtype)

    def diagonal(self) -> Any:
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, 1) * self.scale, self.spec.zeros())

    def along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        return basis.of_diagonal(self.diagonal())

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> ScaledIdentity:
        return dataclasses.replace(self, spec=self.spec.restrict(keep, treedef))

    def rescaled(self, factors: Sequence[Scalar]) -> Diagonal:
        return Diagonal(self.diagonal(), self.spec).rescaled(factors)

    def scaled(self, factor: Scalar) -> ScaledIdentity:
        return dataclasses.replace(self, scale=factor * self.scale)

    def plus(self, other: Form) -> Form:
        if isinstance(other, ScaledIdentity):
            return dataclasses.replace(self, scale=self.scale + other.scale)
        if isinstance(other, Shifted):
            return other.plus(self)
        return Shifted(other, self.scale)

    def counted_eigenvalues(self) -> list[tuple[Array, int]]:
        return [(self.scale[None], self.spec.size)]

    def apply(self, function: Callable[[Array], Array], v: Any) -> Any:
        return jax.tree.map(lambda leaf: function(self.scale) * leaf, v)


@array_fields("base", "shift", repr=False)
class Shifted(Form):
    """``F + shift I``, with F in its own form: the shift acts as a permanent damping."""

    base: Form
    shift: Scalar

    @property
    def spec(self) -> ParamSpec:  # type: ignore[override]
        """The parameters' spec."""
        return self.base.spec

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of F's form, and that a multiple of the identity is added."""
        return f"{self.base.name} + scaled identity"

    @property
    def averages(self) -> bool:  # type: ignore[override]
        """Whether F's form averages."""
        return self.base.averages

    @property
    def formed(self) -> bool:  # type: ignore[override]
        """Whether F's form holds its matrix."""
        return self.base.formed

    @property
    def halved(self) -> bool:  # type: ignore[override]
        """Whether F's form is."""
        return self.base.halved

    @property
    def stack(self) -> tuple[int, ...]:
        return self.base.stack or jnp.shape(self.shift)

    def as_matrix(self) -> Float[Array, "p p"]:
        return self.base.as_matrix() + self.shift * jnp.eye(self.spec.size, dtype=self.spec.dtype)

    def diagonal(self) -> Any:
        return jax.tree.map(lambda leaf: leaf + self.shift, self.base.diagonal())

    def product(self) -> Callable[[Any], Any]:
        product = self.base.product()
        return lambda v: jax.tree.map(lambda f, x: f + self.shift * x, product(v), v)

    def inner_products(self, vectors: Any) -> Float[Array, "k k"]:
        return self.base.inner_products(vectors) + self.shift * products(vectors, vectors)

    def trace(self) -> Scalar:
        return self.base.trace() + self.spec.size * self.shift

    def eigvalsh(self) -> Float[Array, " p"]:
        return self.base.eigvalsh() + self.shift

    def frobenius_norm(self) -> Scalar:
        both = jnp.stack([self.base.frobenius_norm(), self.spec.size**0.5 * self.shift])
        largest = jnp.maximum(jnp.max(both), jnp.finfo(both.dtype).tiny)
        cross = 2 * (self.base.trace() / largest) * (self.shift / largest)
        return largest * jnp.sqrt(jnp.sum(jnp.square(both / largest)) + cross)

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> Shifted:
        return dataclasses.replace(self, base=self.base.restrict(keep, treedef))

    def scaled(self, factor: Scalar) -> Shifted:
        return Shifted(self.base.scaled(factor), factor * self.shift)

    def rescaled(self, factors: Sequence[Scalar]) -> Form:
        return added(self.base.rescaled(factors), ScaledIdentity(self.shift, self.spec).rescaled(factors))

    def with_unit_damping(self, dampings: Sequence[Scalar]) -> tuple[Form, tuple[Scalar, ...]]:
        return self.base.with_unit_damping([damping + self.shift for damping in dampings])

    def plus(self, other: Form) -> Shifted:
        if isinstance(other, ScaledIdentity):
            return dataclasses.replace(self, shift=self.shift + other.scale)
        if isinstance(other, Shifted):
            return Shifted(added(self.base, other.base), self.shift + other.shift)
        return dataclasses.replace(self, base=added(self.base, other))

    def inverse(self, damping: Scalar) -> Inverted:
        return self.base.inverse(damping + self.shift)

    def inverses(self, largest: Scalar, factorise: Factorise) -> Callable[[Scalar], Inverted]:
        base = self.base.inverses(largest + self.shift, factorise)
        return lambda damping: base(damping + self.shift)

    def logdet(self, damping: Scalar) -> Scalar:
        return self.base.logdet(damping + self.shift)

    def power_mv(self, v: Any, power: Scalar, damping: Scalar) -> Any:
        return self.base.power_mv(v, power, damping + self.shift)


@by_entry.register
def _(form: ScaledIdentity) -> Diagonal:
    return Diagonal(form.diagonal(), form.spec)


@by_entry.register
def _(form: Shifted) -> Shifted:
    return dataclasses.replace(form, base=by_entry(form.base))


def scaled_identity(like: Operator | chex.ArrayTree, scale: chex.Numeric) -> Operator:
    r"""``scale I`` as an operator, to add to a Fisher as the precision of an isotropic Gaussian prior, or as a ridge.

    ``F + jf.scaled_identity(F, c)`` keeps the form of F: its solves, factors and draws are those of F with a damping of ``c``.
    A Fisher is a mean over examples, so a prior of precision ``1/s^2`` over n examples is ``c = 1 / (n s^2)``.

    Args:
        like: an operator over the parameters, or the parameters.
        scale: ``>= 0``, in the units of F.

    Raises:
        ValueError: a negative ``scale``.
        TypeError: a parameter that is not a floating array.

    Reference: MacKay, A practical Bayesian framework for backpropagation networks (Neural Computation 1992), section 2.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> F = jf.exact_fisher(lambda w, x: jf.Bernoulli(logits=w * x))(0.0, jnp.array([1.0, 3.0]))
    >>> F + jf.scaled_identity(F, 0.75)
    Fisher((exact, mean over 2) + (scaled identity), params 1, exact as scores + scaled identity)
    >>> print((F + jf.scaled_identity(F, 0.75)).solve(1.0, damping=0.0))  # 1 / (5/4 + 3/4)
    0.5
    """
    spec = like.spec if isinstance(like, Operator) else param_spec(like)
    return Operator(ScaledIdentity(nonnegative("scale", scale, spec.dtype), spec), Provenance("scaled identity"))


def relative_damping(fisher: Operator, share: chex.Numeric) -> Scalar:
    r"""A damping relative to the mean eigenvalue: ``share * trace(F) / p``, absolute, in the units of F.

    Args:
        fisher: any operator.
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
