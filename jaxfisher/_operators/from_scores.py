r"""Fishers held as their scores: ``F = S^T diag(omega) S``, exact, and never formed.

With ``X = diag(sqrt(omega)) S`` a damped solve has two routes, and takes the one with the smaller matrix:

* p x p: ``(X^T X + damping I) x = v``.
* rows x rows (push-through): for ``v = X^T e``, ``x = X^T (X X^T + damping I)^-1 e``; any other ``v`` has a
  part outside the span of the rows, on which only the damping acts.

Reference: Ren and Goldfarb, Efficient subsampled Gauss-Newton and natural gradient methods (arXiv 1906.02353), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._damped import Damped, solution
from jaxfisher._engine import Basis, unsealed
from jaxfisher._inverse import Factored, Map, log_determinant, multiplied
from jaxfisher._linalg import (
    eigenvalues,
    inverse_power,
    mirrored,
    norm,
    power_or_one,
    square_root,
    to_unit,
    twice,
    unit_diagonal,
    unit_rank,
    without_noise,
)
from jaxfisher._matrix_power import power_mv, power_of_rows_mv
from jaxfisher._once import Static, once
from jaxfisher._operators.form import Form
from jaxfisher._operators.inverted import Inverted, flat_inverse
from jaxfisher._pytree import array_fields
from jaxfisher._scores import HeldScores, JoinedScores, Scores
from jaxfisher._system import Factorise, Rows, System
from jaxfisher._tree import ParamSpec, split
from jaxfisher._varying import cond, while_loop


@array_fields("scores", repr=False)
class FromScores(Form):
    """``S^T diag(omega) S``, with the scores themselves held."""

    scores: Scores

    name = "exact as scores"
    halved = True

    @property
    def spec(self) -> ParamSpec:  # type: ignore[override]
        """The parameters' spec."""
        return self.scores.spec

    @property
    def stack(self) -> tuple[int, ...]:
        return self.scores.stack

    def as_matrix(self) -> Float[Array, "p p"]:
        return self.scores.second_moment()

    def diagonal(self) -> Any:
        return split(self.scores.diagonal())

    def product(self) -> Callable[[Any], Any]:
        return lambda v: split(self.scores.rmv(self.scores.weights * self.scores.mv(v)))

    def trace(self) -> Scalar:
        return jnp.sum(self.scores.weights * self.scores.squared_norms())

    def inner_products(self, vectors: Any) -> Float[Array, "k k"]:
        return self.scores._inner_products(vectors)

    def eigvalsh(self) -> Float[Array, " p"]:
        """The p eigenvalues, ascending, from the smaller of the two matrices."""
        factor = to_unit(self.scores.bound())
        scaled = Scaled(self.scores, factor)
        small = scaled.gram() if scaled.short else scaled.moment()
        # This hides nothing: X^T X has no negative eigenvalues, so a negative one is a rounding error.
        found = eigenvalues(small)
        values = without_noise(jnp.where(found < 0, 0, found)) * (1 / factor) * (1 / factor)
        return jnp.concatenate([jnp.zeros(self.spec.size - small.shape[0], values.dtype), values])

    def frobenius_norm(self) -> Scalar:
        factor = to_unit(self.scores.bound())
        scaled = Scaled(self.scores, factor)
        small = mirrored(scaled.gram()) if scaled.short else scaled.moment()
        return norm(small.reshape(-1)) * (1 / factor) * (1 / factor)

    def rank(self) -> Int[Array, ""]:
        """The rank, from the smaller of the two matrices."""
        scaled = Scaled(self.scores, to_unit(self.scores.bound()))
        if not scaled.short:
            return unit_rank(scaled.centred().moment())
        own = unit_rank(mirrored(scaled.gram()))
        # The rank is at most the number of rows. A direction that seems to be missing may only be small in its units.
        return cond(own == self.scores.num_rows, lambda: own, lambda: unit_rank(scaled.gram_in_units()))

    def logdet(self, damping: Scalar) -> Scalar:
        factor = to_unit(self.scores.bound(), jnp.sqrt(jnp.abs(damping)))
        scaled, damping = Scaled(self.scores, factor), twice(damping, factor)
        small = scaled.gram() if scaled.short else scaled.moment()
        # Outside the span of the rows the eigenvalue is the damping.
        missing = self.spec.size - small.shape[0]
        outside = missing * jnp.log(damping) if missing else 0
        return log_determinant(small, damping) + outside - 2 * self.spec.size * jnp.log(factor)

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> FromScores:
        return FromScores(self.scores.restrict(keep, self.spec.restrict(keep, treedef)))

    def as_scores(self) -> Scores:
        return self.scores

    def along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        return self.scores.squares_along(basis)

    def rescaled(self, factors: Sequence[Scalar]) -> FromScores:
        return FromScores(self.scores.rescaled(tuple(factors)))

    def scaled(self, factor: Scalar) -> FromScores:
        return FromScores(self.scores.reweighted(factor))

    def plus(self, other: Form) -> Form | None:
        # A subclass has more than its scores, so it must make the sum itself.
        if type(other) is not FromScores or not (isinstance(self.scores, HeldScores) and isinstance(other.scores, HeldScores)):
            return None
        return FromScores(JoinedScores((self.scores, other.scores)))

    def inverses(self, largest: Scalar, factorise: Factorise) -> Callable[[Scalar], Inverted]:
        factor = to_unit(self.scores.bound(), jnp.sqrt(jnp.abs(largest)))
        scaled = Scaled(self.scores, factor)
        if scaled.short:
            matrix = scaled.gram()
            system = partial(by_gram, scaled, jax.lax.stop_gradient(matrix))
        else:
            scaled = scaled.centred()
            matrix = scaled.moment()
            system = partial(_by_moment, scaled, jax.lax.stop_gradient(jnp.sqrt(jnp.diagonal(matrix))))
        # Derivatives go through the products that solutions satisfy.
        matrices = factorise.factor(jax.lax.stop_gradient(matrix))

        def at(damping: Scalar) -> Inverted:
            damping = twice(damping, scaled.factor)
            inverse = system(damping, matrices(jax.lax.stop_gradient(damping)))
            return flat_inverse(self.spec, partial(factorise.solved, inverse))

        return at

    def power_mv(self, v: Any, power: Scalar, damping: Scalar) -> Any:
        # With X = U diag(sqrt(s)) W^T the power is damping^q on the complement of W, so
        # (F + d I)^q v = d^q v + X^T U [((s + d)^q - d^q) / s] U^T X v, the difference by expm1 so that it does not cancel.
        factor = to_unit(self.scores.bound(), jnp.sqrt(jnp.abs(damping)))
        scaled, damping = Scaled(self.scores, factor), twice(damping, factor)
        flat = self.spec.ravel(v, "v")
        if not scaled.short:
            x = self.spec.unravel(power_mv(scaled.moment(), flat, power, damping))
            return jax.tree.map(lambda leaf: leaf * (factor**-power) * factor**-power, x)
        damped = ~(damping <= 0)  # a NaN is no zero
        outside = jnp.where(damped, jnp.where(damped, damping, 1) ** power, 0)
        c = power_of_rows_mv(scaled.gram(), scaled.into_rows(flat), power, damping)
        result = outside * flat + scaled.out_of_rows(c)
        return self.spec.unravel(result * (factor**-power) * factor**-power)

    @once
    def solve_row_space(self, e: Float[Array, " rows"], damping: Scalar, rtol: Static[float]) -> Any:
        """``x = (F + damping I)^-1 S^T diag(omega) e``: the solve for a vector given by its coordinates in the rows.

        This is the natural gradient's solve, since the gradient of a mean of log-densities has all coordinates one. It has no
        cancellation. The residual is about ``rtol`` of the right-hand side. If there are fewer rows than parameters, a damping
        that the dtype cannot tell from zero is replaced by the smallest one that it can.
        """
        factor = to_unit(self.scores.bound(), jnp.sqrt(jnp.abs(damping)))
        scaled, damping = Scaled(self.scores, factor), twice(damping, factor)
        b = scaled.root * e
        if scaled.short:
            out = jax.tree_util.Partial(Scaled.rmv, scaled)
            return solution(Damped(scaled.gram(), damping, out, scaled.mv, factor, of_root=True), b, rtol.value)
        product = lambda x: scaled.out_of_rows(scaled.into_rows(x))  # noqa: E731
        v = scaled.out_of_rows(b)
        # Scale a tiny right-hand side, whose squares would underflow.
        size = power_or_one(jnp.max(jnp.abs(v), initial=0.0))
        identity = jax.tree_util.Partial(lambda x: x)
        system = Damped(scaled.moment(), damping, identity, product, size, of_root=False)
        return self.spec.unravel(solution(system, v * inverse_power(size), rtol.value) * factor)


@array_fields("scores", "factor")
class Scaled:
    """``X = factor diag(sqrt(omega)) S``, scaled so that its squares neither overflow nor underflow."""

    scores: Scores
    factor: Scalar

    @property
    def root(self) -> Float[Array, " rows"]:
        """Square roots of the weights. A weight of zero marks padding, whose rows are zero at any weight."""
        return square_root(self.scores.weights)

    @property
    def short(self) -> bool:
        """Whether the rows are fewer than the columns, so that ``X X^T`` is the smaller matrix."""
        return self.scores.num_rows < self.scores.spec.size

    def mv(self, v: Any) -> Float[Array, " rows"]:
        """``X v`` for a computed vector shaped like the parameters."""
        return self.factor * self.root * self.scores.product(v, unsealed)

    def rmv(self, c: Float[Array, " rows"]) -> Any:
        """``X^T c``, shaped like the parameters."""
        return split(self.scores.rmv(self.factor * self.root * c))

    def into_rows(self, x: Float[Array, " p"]) -> Float[Array, " rows"]:
        """``X x`` for any flat vector."""
        return self.factor * self.root * self.scores.mv(self.scores.spec.unravel(x))

    def out_of_rows(self, c: Float[Array, " rows"]) -> Float[Array, " p"]:
        """``X^T c``, flat."""
        return self.scores.spec.ravel(self.rmv(c), "v")

    def gram(self) -> Float[Array, "rows rows"]:
        """The upper triangle of ``X X^T``."""
        return self.root[:, None] * self.scores.gram_upper(self.factor) * self.root[None, :]

    def moment(self) -> Float[Array, "p p"]:
        """``X^T X``."""
        return self.scores.scaled_moment(self.factor)

    def centred(self) -> Scaled:
        """The same scores, scaled so that the largest is well above one.

        The scales of parameters may differ so much that float32 can hold their squares only if the middle scale is near one.
        """
        return Scaled(self.scores, self.factor * 2.0**50)

    def columns(self) -> Float[Array, " p"]:
        """The squared norms of the columns of X."""
        scores = self.scores.rescaled((self.factor,) * len(self.scores.spec.sizes))
        return self.scores.spec.ravel(scores.diagonal(), "diagonal")

    def gram_in_units(self) -> Float[Array, "rows rows"]:
        """``X D^2 X^T``, where D scales the columns to unit norm; slow, since it takes a product of X with each row in turn."""
        units = unit_diagonal(self.columns())
        rows = jnp.eye(self.scores.num_rows, dtype=units.dtype)
        return jax.lax.map(lambda row: self.into_rows(units * (units * self.out_of_rows(row))), rows)


def _by_moment(scaled: Scaled, columns: Float[Array, " p"], damping: Scalar, inverse: Factored) -> System:
    """The p x p route, given the norms of the columns; all numbers are in the units of ``scaled``."""
    scores, size, units = scaled.scores, inverse.unit.size, inverse.unit * scaled.factor
    shares = twice(damping, inverse.unit)

    def into_rows(y: Array) -> Array:
        return scaled.root * scores.mv(scores.spec.unravel(units * y))

    def product(y: Array) -> Array:
        return units * scores.spec.ravel(scores.rmv(scaled.root * into_rows(y)), "v") + shares * y

    factored = inverse.projected(lambda y: jax.lax.stop_gradient(product(y)))

    def left_out(b: Array, y: Array) -> tuple[Bool[Array, ""], Scalar]:
        # The scores determine the null space more accurately than their second moment does.
        null = factored.left_out
        rounding = 10 * size * jnp.finfo(y.dtype).eps * jnp.vdot(columns * inverse.unit, jnp.abs(null))
        return norm(into_rows(null)) <= rounding, factored.astray(b, y)

    return System(product, factored.in_units, damping, units, factored, factored.rank, left_out)


def by_rows(scaled: Scaled, apply: Map, share: Scalar, v: Float[Array, " p"]) -> Float[Array, " p"]:
    """The solution for ``v`` by ``apply``, which is ``(X X^T + damping I)^-1``, and ``share``, one over the damping or zero."""

    def half(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        count, e, rest, image = state
        rest = rest - image
        e = apply(e + jnp.where(count == 0, 1, -share) * scaled.into_rows(rest))
        return count + 1, e, rest, scaled.out_of_rows(e)

    # Use a loop, so that the program contains the products once: the first pass gives A X v, the second the solution.
    begin = jnp.zeros((), jnp.int32), jnp.zeros_like(scaled.root), v, jnp.zeros_like(v)
    _, _, rest, inside = while_loop(lambda state: state[0] < 2, half, begin)
    return inside + share * rest


def by_gram(scaled: Scaled, gram: Float[Array, "rows rows"], damping: Scalar, inverse: Factored) -> System:
    """The rows x rows route for any ``v``, split into its part in the span of the rows, ``X^T e``, and the rest.

    ``v = X^T e + r`` gives ``x = X^T A e + (r - X^T A X r) / damping`` with ``A = (X X^T + damping I)^-1``, exactly, for any
    ``e``. With ``e = 0`` this is Woodbury's identity, which loses more digits to cancellation the smaller the damping is; with
    ``e = A X v`` little of ``r`` is left to cancel. Without damping, ``x = X^T A e`` is the minimum-norm solution.

    The map from ``v`` to the result is symmetric and positive even if ``A`` is only approximate:
    ``x = X^T A^2 X v + (1 - X^T A X)^2 v / damping``.
    """
    scores, told, factored = scaled.scores, inverse.told, inverse.projected(multiplied(gram, damping, inverse.unit))

    def split(v: Array) -> Array:
        return by_rows(scaled, factored.apply, jnp.where(told, 1 / jnp.where(told, damping, 1), 0), v)

    def product(y: Array) -> Array:
        return scaled.out_of_rows(scaled.into_rows(y)) + damping * y

    def left_out(b: Array, y: Array) -> tuple[Bool[Array, ""], Scalar]:
        # Nothing was projected: the last correction is the whole error.
        return _is_unseen(scaled, factored), jnp.zeros((), b.dtype)

    size = scores.spec.size
    rank = jnp.where(told, jnp.asarray(size, jnp.int32), factored.rank)
    rows = Rows(scaled.into_rows, scaled.out_of_rows)
    return System(product, split, damping, scaled.factor, factored, rank, left_out, rows)


def _is_unseen(scaled: Scaled, factored: Factored) -> Bool[Array, ""]:
    """Whether a combination of rows that counts as zero has only rounding errors as entries, relative to its columns' norms.

    Its part along the directions that were kept is taken out first. The norms of columns are estimated from random
    combinations of rows, well within the margin. One loop does everything, so that the program contains the products once.
    """
    rows, trials = scaled.scores.num_rows, 8
    places = jnp.arange(rows, dtype=scaled.root.dtype)

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        count, e, _, squares = state
        trial = count < trials
        given = jnp.where(trial, 2**0.5 * jnp.cos(jnp.square(places) + count.astype(e.dtype) * places), e)
        image = scaled.out_of_rows(given)
        rest = given - factored.apply(scaled.into_rows(image))
        return count + 1, jnp.where(trial, e, rest), image, squares + jnp.where(trial, jnp.square(image), 0)

    e = factored.unit * factored.left_out
    nothing = jnp.zeros(scaled.scores.spec.size, e.dtype)
    _, e, image, squares = while_loop(
        lambda state: state[0] < trials + 2, step, (jnp.zeros((), jnp.int32), e, nothing, nothing)
    )
    rounding = 10 * rows * jnp.finfo(e.dtype).eps * norm(e)
    return jnp.all(jnp.abs(image) <= rounding * jnp.sqrt(squares / trials))
