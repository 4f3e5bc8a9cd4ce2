r"""Operators that know their eigenvectors: every function of one is that function of its eigenvalues.

``F = Q diag(lambda) Q^T`` gives ``f(F) = Q diag(f(lambda)) Q^T``: solves, roots, determinants and norms at any damping, from
what is held.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Scalar

from jaxfisher._inverse import Factorise, Solved
from jaxfisher._linalg import norm, resolved
from jaxfisher._operators.base import Operator
from jaxfisher._operators.inverted import Inverted


class Spectral(Operator):
    """An operator with its eigenvalues, and what applies a function of them."""

    @abc.abstractmethod
    def _eigenvalues(self) -> list[tuple[Array, int]]:
        """Arrays of eigenvalues, each with the number of times it occurs."""

    @abc.abstractmethod
    def _apply(self, function: Callable[[Array], Array], v: Any) -> Any:
        """``Q diag(function(lambda)) Q^T v``."""

    def _resolve(self, damping: Scalar) -> Callable[[Array], Array]:
        """Eigenvalues to what they count as: zero inside rounding error, which is that of the largest of them."""
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(values), initial=0.0) for values, _ in self._eigenvalues()]))
        return lambda values: resolved(values, damping, largest, self.size)

    def linearised(self) -> Callable[[Any], Any]:
        return lambda v: self._apply(lambda values: values, v)

    def eigvalsh(self) -> Float[Array, " p"]:
        """The p eigenvalues, ascending."""
        return jnp.sort(jnp.concatenate([jnp.repeat(values.reshape(-1), count) for values, count in self._eigenvalues()]))

    def trace(self) -> Scalar:
        return self._sum(lambda values: values)

    def frobenius_norm(self) -> Scalar:
        return norm(jnp.concatenate([(values * count**0.5).reshape(-1) for values, count in self._eigenvalues()]))

    def rank(self) -> Int[Array, ""]:
        resolve = self._resolve(jnp.zeros((), self.spec.dtype))
        return self._count(lambda values: resolve(values) != 0)

    def _logdet(self, damping: Scalar) -> Scalar:
        resolve = self._resolve(damping)
        return self._sum(lambda values: jnp.log(resolve(values) + damping))

    def _sum(self, function: Callable[[Array], Array]) -> Scalar:
        parts = [count * jnp.sum(function(values)) for values, count in self._eigenvalues()]
        return sum(parts[1:], start=parts[0])

    def _count(self, flags: Callable[[Array], Array]) -> Int[Array, ""]:
        parts = [count * jnp.sum(flags(values), dtype=jnp.int32) for values, count in self._eigenvalues()]
        return sum(parts[1:], start=parts[0])

    def _inverse(self, damping: Scalar) -> Inverted:
        return self.inverse_of(self.linearised(), damping)

    def inverse_of(self, product: Callable[[Any], Any], damping: Scalar) -> Inverted:
        """Of ``product``, which these are the eigenvectors of."""
        resolve = self._resolve(damping)
        rank = self._count(lambda values: resolve(values) + damping != 0)

        def apply(v: Any) -> Solved:
            x = self._power_mv(v, jnp.asarray(-1, self.spec.dtype), damping)
            return Solved(x, jax.tree.map(lambda b, f, y: b - f - damping * y, v, product(x), x), rank)

        return apply

    def inverses(self, largest: Scalar, factorise: Factorise) -> Callable[[Scalar], Inverted]:
        return self._inverse

    def _power_mv(self, v: Any, power: Scalar, damping: Scalar) -> Any:
        resolve = self._resolve(damping)

        def powers(values: Array) -> Array:
            shifted = resolve(values) + damping
            kept = shifted != 0
            return jnp.where(kept, jnp.where(kept, shifted, 1) ** power, 0)

        return self._apply(powers, v)
