r"""Forms that know their eigenvectors, and compute a function of the matrix from that function of the eigenvalues.

``F = Q diag(lambda) Q^T`` gives ``f(F) = Q diag(f(lambda)) Q^T``, and with it solves, roots, determinants and norms at any
damping.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._linalg import in_another_rounding, norm, resolved, unit_diagonal
from jaxfisher._null_space import is_unseen
from jaxfisher._operators.form import Form
from jaxfisher._operators.inverted import Inverted
from jaxfisher._system import Factorise, Solved
from jaxfisher._tree import ParamSpec
from jaxfisher._varying import cond, linear_solve


class Spectral(Form):
    """A form that knows its eigenvalues and can apply a function of them; it implements these two in place of `product`."""

    @abc.abstractmethod
    def counted_eigenvalues(self) -> list[tuple[Array, int]]:
        """Arrays of eigenvalues, each with the number of times it occurs."""

    @abc.abstractmethod
    def apply(self, function: Callable[[Array], Array], v: Any) -> Any:
        """``Q diag(function(lambda)) Q^T v``."""

    def resolve(self, damping: Scalar) -> Callable[[Array], Array]:
        """A function of eigenvalues that sets those inside the rounding error of the largest one to zero."""
        largest = self._largest()
        return lambda values: resolved(values, damping, largest, self.spec.size)

    def product(self) -> Callable[[Any], Any]:
        return lambda v: self.apply(lambda values: values, v)

    def eigvalsh(self) -> Float[Array, " p"]:
        """The p eigenvalues, ascending."""
        return jnp.sort(
            jnp.concatenate([jnp.repeat(values.reshape(-1), count) for values, count in self.counted_eigenvalues()])
        )

    def trace(self) -> Scalar:
        return self._sum(lambda values: values)

    def frobenius_norm(self) -> Scalar:
        return norm(jnp.concatenate([(values * count**0.5).reshape(-1) for values, count in self.counted_eigenvalues()]))

    def rank(self) -> Int[Array, ""]:
        resolve = self.resolve(jnp.zeros((), self.spec.dtype))
        return self._count(lambda values: resolve(values) != 0)

    def logdet(self, damping: Scalar) -> Scalar:
        resolve = self.resolve(damping)
        return self._sum(lambda values: jnp.log(resolve(values) + damping))

    def _sum(self, function: Callable[[Array], Array]) -> Scalar:
        parts = [count * jnp.sum(function(values)) for values, count in self.counted_eigenvalues()]
        return sum(parts[1:], start=parts[0])

    def _count(self, flags: Callable[[Array], Array]) -> Int[Array, ""]:
        parts = [count * jnp.sum(flags(values), dtype=jnp.int32) for values, count in self.counted_eigenvalues()]
        return sum(parts[1:], start=parts[0])

    def inverse_of(self, form: Form, damping: Scalar) -> Inverted:
        """The inverse of a form that has these eigenvectors."""
        product = form.product()
        resolve = self.resolve(damping)
        rank = self._count(lambda values: resolve(values) + damping != 0)
        # Derivatives go through the products that solutions satisfy.
        still, at = jax.lax.stop_gradient((self, damping))
        solve = partial(still.power_mv, power=jnp.asarray(-1, self.spec.dtype), damping=at)
        return applied_once(solve, product, damping, still.tests(jax.lax.stop_gradient(form), at), rank, self.spec)

    def tests(self, form: Form, damping: Scalar) -> Callable[..., Bool[Array, ""]]:
        """The test of a solution that `applied_once` calls."""
        eps, largest, resolve = jnp.finfo(self.spec.dtype).eps, self._largest(), self.resolve(damping)
        told, noise = ~(damping <= eps * largest), 4 * self.spec.size * eps
        # Sums of squares that should be zero come out at rounding squared; a value between that and rounding is ambiguous.
        low = self._count(lambda values: (jnp.abs(values) > noise**2 * largest) & (jnp.abs(values) < noise * largest))
        clear = told | ((low == 0) & cond(told, lambda: told, lambda: self._blind(form, resolve)))
        # The eigenvectors are orthonormal in the parameters' own units, so the units are one.
        return Tests(
            damping, told, clear, jnp.asarray(True), jnp.ones((), self.spec.dtype), lambda v, x, rest: jnp.zeros_like(x[0])
        )

    def _blind(self, form: Form, resolve: Callable[[Array], Array]) -> Bool[Array, ""]:
        """Whether directions whose eigenvalue counts as zero lie in the null space: they may only be small in their units."""
        roots = jnp.sqrt(jnp.abs(self.spec.ravel(form.diagonal(), "diagonal")))
        trial = unit_diagonal(jnp.square(roots)) * jnp.cos(jnp.arange(self.spec.size, dtype=self.spec.dtype))
        left_out = self.apply(lambda values: (resolve(values) == 0).astype(values.dtype), self.spec.unravel(trial))
        # If nothing was left out, this is the rounding error of the trial.
        return is_unseen(self.spec.ravel(form.product()(left_out), "v"), trial, roots)

    def _largest(self) -> Scalar:
        """The largest eigenvalue in absolute value."""
        return jnp.max(jnp.stack([jnp.max(jnp.abs(values), initial=0.0) for values, _ in self.counted_eigenvalues()]))

    def inverses(self, largest: Scalar, factorise: Factorise) -> Callable[[Scalar], Inverted]:
        return partial(self.inverse_of, self)

    def power_mv(self, v: Any, power: Scalar, damping: Scalar) -> Any:
        return self.apply(partial(self.powers, power=power, damping=damping), v)

    def powers(self, values: Array, power: Scalar, damping: Scalar) -> Array:
        """``(values + damping)^power``, zero where that is no power; eigenvalues inside rounding error count as zero."""
        shifted = self.resolve(damping)(values) + damping
        kept = shifted != 0
        return jnp.where(kept, jnp.where(kept, shifted, 1) ** power, 0)


Vector = Float[Array, " p"]


def applied_once(
    solve: Callable[[Any], Any],
    product: Callable[[Any], Any],
    damping: Scalar,
    sound: Callable[..., Bool[Array, ""]],
    rank: Int[Array, ""],
    spec: ParamSpec,
) -> Inverted:
    """The inverse of ``product`` plus a damping by ``solve``, without refinement.

    ``sound`` decides whether ``x`` can be trusted, from ``v``, ``x``, its residual, the rounding error of that, and the next
    correction, all flat.
    """

    def damped(x: Any) -> Any:
        return jax.tree.map(lambda f, y: f + damping * y, product(x), x)

    def apply(v: Any) -> Solved:
        x, _ = linear_solve(damped, v, lambda _, b: (solve(b), ()))
        rest = jax.tree.map(jnp.subtract, v, damped(x))
        noise = jax.tree.map(lambda r, b, y: r - (b - y), rest, v, in_another_rounding(damped, x))
        # The inverse of an infinite matrix is zero, which would look like an answer: pass on the NaN of the residual.
        x = jax.tree.map(lambda y, r: jnp.where(jnp.isnan(r), r, y), x, rest)
        return Solved(x, rest, rank, sound(*(spec.ravel(tree, "v") for tree in (v, x, rest, noise, solve(rest)))))

    return apply


@dataclasses.dataclass(frozen=True)
class Tests:
    """The tests of a solution that `jaxfisher.SolveInfo` states, for routes without refinement.

    Attributes:
        damping: the damping, in the units of F.
        told: whether the dtype can tell the damping from zero.
        clear: whether the eigenvalues that were kept are above rounding.
        whole: whether all eigenvalues were kept.
        units: the units in which F has a unit diagonal, or one for the parameters' own.
        astray: from ``v``, ``x`` and the residual, how much of ``x`` may be due to directions that were left out inexactly.
    """

    damping: Scalar
    told: Bool[Array, ""]
    clear: Bool[Array, ""]
    whole: Bool[Array, ""]
    units: Float[Array, "..."]
    astray: Callable[[Array, Array, Array], Scalar]

    def __call__(self, v: Vector, x: Vector, rest: Vector, noise: Vector, again: Vector) -> Bool[Array, ""]:
        """Whether ``x`` can be trusted, given ``v``, the residual, its rounding error, and the next correction."""
        eps, tiny = jnp.finfo(x.dtype).eps, jnp.finfo(x.dtype).tiny

        def is_small(scale: Array | int) -> Bool[Array, ""]:
            return norm(scale * rest) + 4 * norm(scale * noise) <= eps**0.5 * norm(scale * v)

        own, small = is_small(1), is_small(self.units)
        scale = jnp.where(self.whole, 1 / self.units, 1)
        astray = cond(self.whole, lambda: jnp.zeros_like(x[0]), lambda: self.astray(v, x, rest))
        error = jnp.maximum(norm(scale * again), astray)
        near = error <= eps**0.5 / 8 * norm(scale * x)
        there = (norm(x) > tiny / eps) | (norm(v) == 0)
        untold = self.clear & near & ((small & self.whole) | (self.damping == 0))
        return there & jnp.where(self.told, own, untold)
