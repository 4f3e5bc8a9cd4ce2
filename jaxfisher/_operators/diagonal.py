"""Diagonal Fishers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Scalar

from jaxfisher._engine import Basis
from jaxfisher._operators.dense import by_entry
from jaxfisher._operators.form import Form
from jaxfisher._operators.operator import Operator, viewed
from jaxfisher._operators.spectral import Spectral
from jaxfisher._pytree import array_fields
from jaxfisher._tree import ParamSpec, kept, split


@array_fields("entries", repr=False)
class Diagonal(Spectral):
    """A diagonal matrix, one number per parameter, held as a pytree like the parameters."""

    entries: Any
    spec: ParamSpec

    name = "diagonal"
    averages = True
    halved = True

    @property
    def stack(self) -> tuple[int, ...]:
        leaves: list[Array] = jax.tree.leaves(self.entries)
        return leaves[0].shape[: leaves[0].ndim - len(self.spec.shapes[0])] if leaves else ()

    def as_matrix(self) -> Float[Array, "p p"]:
        return jnp.diag(self.spec.ravel(self.entries, "entries"))

    def diagonal(self) -> Any:
        return self.entries

    def along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        return basis.of_diagonal(self.entries)

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> Diagonal:
        spec = self.spec.restrict(keep, treedef)
        return Diagonal(spec.tree(list(kept(jax.tree.leaves(self.entries), keep))), spec)

    def rescaled(self, factors: Sequence[Scalar]) -> Diagonal:
        leaves = jax.tree.leaves(self.entries)
        return Diagonal(self.spec.tree([f * f * leaf for f, leaf in zip(factors, leaves, strict=True)]), self.spec)

    def scaled(self, factor: Scalar) -> Diagonal:
        return Diagonal(jax.tree.map(lambda leaf: factor * leaf, self.entries), self.spec)

    def plus(self, other: Form) -> Diagonal | None:
        if not isinstance(other, Diagonal):
            return None
        return Diagonal(jax.tree.map(jnp.add, self.entries, other.entries), self.spec)

    def counted_eigenvalues(self) -> list[tuple[Array, int]]:
        return [(leaf, 1) for leaf in jax.tree.leaves(self.entries)]

    def apply(self, function: Callable[[Array], Array], v: Any) -> Any:
        return jax.tree.map(lambda d, x: function(d) * x, self.entries, v)

    def resolve(self, damping: Scalar) -> Callable[[Array], Array]:
        # Each entry has its own relative accuracy, so none is zero to the rounding of another.
        return lambda values: values

    def tests(self, form: Form, damping: Scalar) -> Callable[..., Bool[Array, ""]]:
        # So has each entry of the solution: its residual is rounding error, unless the solution overflows or underflows.
        reached = self.spec.ravel(self.entries, "entries") + damping != 0
        most = jnp.finfo(self.spec.dtype).eps ** 0.5
        return lambda v, x, rest, noise, again: jnp.all(jnp.abs(rest) <= most * jnp.abs(v), where=reached)


@by_entry.register
def _(form: Diagonal) -> Diagonal:
    return form


def diagonal(fisher: Operator) -> Operator:
    r"""The Fisher's diagonal as an operator: ``F_jj = 1/n sum_i s_ij^2``, off-diagonal entries dropped.

    With the empirical Fisher of batches of one and ``power=0.5`` this is the second moment of AdaGrad, RMSprop and Adam. It is
    the mean of squared scores, not the square of a mean gradient: the two differ as soon as a batch has more than one example.

    Args:
        fisher: any operator. From scores it costs no n x p buffer beyond the scores themselves.

    Returns:
        An operator of the same kind, held diagonal, with entries as a pytree like the parameters.

    Raises:
        TypeError: ``fisher`` is not an operator.

    Reference: Becker and LeCun, Improving the convergence of back-propagation learning with second order methods (1989); Duchi,
    Hazan and Singer (JMLR 2011), section 1.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> log_prob = jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0))
    >>> print(jf.diagonal(jf.empirical_fisher(log_prob)(0.0, jnp.array([1.0, -2.0]))).diagonal())
    2.5
    """
    fisher = viewed(fisher, "diagonal")
    return Operator(Diagonal(split(fisher.diagonal()), fisher.spec), fisher.provenance)
