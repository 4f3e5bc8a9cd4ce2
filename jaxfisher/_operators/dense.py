"""A Fisher as one p x p matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._linalg import matmul
from jaxfisher._operators.base import Operator, as_operator
from jaxfisher._operators.provenance import Provenance
from jaxfisher._tree import ParamSpec


@partial(jax.tree_util.register_dataclass, data_fields=("matrix",), meta_fields=("spec", "provenance"))
@dataclasses.dataclass(frozen=True, repr=False)
class Dense(Operator):
    """A symmetric matrix over the parameters, every entry held."""

    matrix: Float[Array, "p p"]
    spec: ParamSpec
    provenance: Provenance

    form = "dense"
    averages = True
    held = ("matrix",)

    @property
    def stack(self) -> tuple[int, ...]:
        return self.matrix.shape[:-2]

    def as_matrix(self) -> Float[Array, "p p"]:
        return self.matrix

    def diagonal(self) -> Any:
        return self.spec.unravel(jnp.diagonal(self.matrix))

    def linearised(self) -> Callable[[Any], Any]:
        return lambda v: self.spec.unravel(matmul(self.matrix, self.spec.ravel(v, "v")))

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> Dense:
        kept = [jnp.full(size, flag) for size, flag in zip(self.spec.sizes, keep, strict=True)]
        index = jnp.flatnonzero(jnp.concatenate(kept), size=sum(s for s, k in zip(self.spec.sizes, keep, strict=True) if k))
        return Dense(self.matrix[jnp.ix_(index, index)], self.spec.restrict(keep, treedef), self.provenance)

    def rescaled(self, factors: Sequence[Scalar]) -> Dense:
        parts = [jnp.broadcast_to(f, size) for f, size in zip(factors, self.spec.sizes, strict=True)]
        by_entry = jnp.concatenate(parts).astype(self.matrix.dtype)
        return dataclasses.replace(self, matrix=by_entry[:, None] * self.matrix * by_entry[None, :])

    def _scaled(self, factor: Any) -> Dense:
        return dataclasses.replace(self, matrix=factor * self.matrix, provenance=self.provenance.times())

    def _plus(self, other: Operator) -> Operator:
        if isinstance(other, Dense):
            return Dense(self.matrix + other.matrix, self.spec, self.provenance.plus(other.provenance))
        return super()._plus(other)

    def _small_matrix(self, method: str) -> Float[Array, "p p"]:
        return self.matrix


def dense(fisher: Operator) -> Dense:
    r"""The Fisher as a dense matrix: every entry of ``F``, shape ``[p, p]``, formed once.

    Args:
        fisher: any operator. From scores it costs ``n p^2`` flops; nothing is approximated.

    Returns:
        A `Dense` operator of the same kind.

    Raises:
        TypeError: ``fisher`` is not an operator.

    Reference: Amari (Neural Computation 1998), equation 2.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> log_prob = jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0))
    >>> jf.dense(jf.empirical_fisher(log_prob)(0.0, jnp.array([1.0, -2.0])))
    Fisher(empirical, mean over 2, params 1, dense)
    """
    fisher = as_operator(fisher, "dense").viewed
    return Dense(fisher.as_matrix(), fisher.spec, fisher.provenance)
