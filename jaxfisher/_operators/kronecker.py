r"""Kronecker-factored blocks: a layer's block as ``A (x) G``, or by eigenvectors ``Q_A (x) Q_G`` and their eigenvalues.

The bias and the weight of a layer share one block: the bias is the weight of an input that is always one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._bordered import Bordered, Rows
from jaxfisher._engine import Basis, Layout, Moments
from jaxfisher._inverse import log_determinant
from jaxfisher._linalg import batched, diagonals, eigenvalues, matmul, norm, row_times, unit_diagonal, unit_rank
from jaxfisher._operators.averaging import mean_of
from jaxfisher._operators.dense import Dense
from jaxfisher._operators.form import Form, small_matrix
from jaxfisher._operators.inverted import Inverted
from jaxfisher._operators.layer import Layer
from jaxfisher._operators.side import Side, balanced_shifts, eigenvectors, sides, turned_within
from jaxfisher._operators.spectral import Spectral, Tests, applied_once
from jaxfisher._pytree import array_fields
from jaxfisher._system import Factorise
from jaxfisher._tree import ParamSpec
from jaxfisher._varying import cond


@array_fields("input_side", "outputs", "count", "unit", repr=False)
class Kronecker(Layer):
    """``A (x) G`` of one layer, with both factors held. A running mean averages the factors, as KFAC does.

    Attributes:
        input_side: ``A``, a mean over positions; if the layer has a bias, its row and column are stored separately.
        outputs: ``G``.
        count: the mean number of positions of an example.
        unit: the factor from the mean of ``g g^T`` to ``G``, which gives the product the trace of the block.
    """

    input_side: Bordered
    outputs: Float[Array, "groups outputs outputs"]
    count: Float[Array, " groups"]
    unit: Float[Array, " groups"]
    layout: Layout
    weight: int
    sharing: str
    spec: ParamSpec

    averages = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """The word Kronecker, and how positions that share the weight were counted."""
        return f"Kronecker ({self.sharing})"

    @property
    def inputs(self) -> Float[Array, "groups inputs inputs"]:
        """``A``, whole."""
        return self.input_side.whole()

    @property
    def stack(self) -> tuple[int, ...]:
        return self.outputs.shape[:-3]

    def as_matrix(self) -> Float[Array, "p p"]:
        return self._as_matrix(jax.vmap(jnp.kron)(self.inputs, self.outputs))

    def diagonal(self) -> Any:
        inputs, outputs = self.input_side.diagonals(), diagonals(self.outputs)
        return self._leaves(inputs[:, :, None] * outputs[:, None, :])

    def product(self) -> Callable[[Any], Any]:
        def product(v: Any) -> Any:
            rows, last = self.input_side.times(*self._rows(v))
            return self._from_rows(batched(rows, self.outputs), None if last is None else row_times(last, self.outputs))

        return product

    def trace(self) -> Scalar:
        return jnp.sum(self.input_side.traces() * jnp.sum(diagonals(self.outputs), 1))

    def frobenius_norm(self) -> Scalar:
        norms = jax.vmap(lambda a, g: norm(a.reshape(-1)) * norm(g.reshape(-1)))(self.inputs, self.outputs)
        return norm(norms)

    def factorised(self) -> EigenKronecker:
        """The same block by its eigenvectors, which are those of the factors."""
        return self.by_eigenvectors(eigenvectors(self.input_side), eigenvectors(Bordered(self.outputs)))

    def by_eigenvectors(self, left: tuple[Array, Rows], right: tuple[Array, Rows]) -> EigenKronecker:
        """The block that has these eigenvalues and eigenvectors of its two factors."""
        (a, inputs), (g, outputs) = left, right
        values = a[:, :, None] * g[:, None, :]
        return EigenKronecker(inputs, outputs.core, values, self.layout, self.weight, True, self.spec)

    def eigvalsh(self) -> Float[Array, " p"]:
        return self.factorised().eigvalsh()

    def rank(self) -> Any:
        ranks = (jax.vmap(unit_rank)(factors) for factors in (self.inputs, self.outputs))
        return jnp.sum(jnp.multiply(*ranks), dtype=jnp.int32)

    def logdet(self, damping: Scalar) -> Scalar:
        eps, factors = jnp.finfo(self.spec.dtype).eps, (self.inputs, self.outputs)
        a, g = (jax.vmap(eigenvalues)(factor) for factor in factors)
        values = a[:, :, None] * g[:, None, :]
        told = ~(damping <= eps * jnp.max(values, initial=0.0))

        def alone() -> Scalar:
            # Compute it from the determinants of the factors, each taken in its own units.
            whole, sizes = jax.vmap(lambda x: log_determinant(x, jnp.zeros((), x.dtype))), (g.shape[1], a.shape[1])
            regular = sizes[0] * jnp.sum(whole(factors[0])) + sizes[1] * jnp.sum(whole(factors[1]))
            # If the factors are singular, the damping alone decides.
            return jnp.where((damping > 0) & jnp.isneginf(regular), together(), regular)

        def together() -> Scalar:
            return jnp.sum(jnp.log(values + damping))

        logarithm: Scalar = cond(told, together, alone)
        return logarithm

    def inverse(self, damping: Scalar) -> Inverted:
        """The inverse by the eigenvectors of the factors; without a damping, the product of the factors' pseudo-inverses."""
        halves = self.halves(damping)
        return self.inverse_by(damping, halves, [sides(*half) for half in halves])

    def halves(self, damping: Scalar) -> list[tuple[Array, Array, Array]]:
        """The arguments of `sides` for each factor: the factor, its units, and whether the damping can be told from zero."""
        # Derivatives go through the products that solutions satisfy.
        *factors, at = jax.lax.stop_gradient((self.inputs, self.outputs, damping))
        entries, eps = [diagonals(factor) for factor in factors], jnp.finfo(self.spec.dtype).eps
        told = ~(at <= eps * jnp.max(jnp.max(entries[0], 1) * jnp.max(entries[1], 1)))
        each = jnp.broadcast_to(told, len(self.outputs))
        return [(factor, jax.vmap(unit_diagonal)(part), each) for factor, part in zip(factors, entries, strict=True)]

    def inverse_by(self, damping: Scalar, halves: Sequence[tuple[Array, Array, Array]], found: Sequence[Side]) -> Inverted:
        """The inverse, from the results of `sides` for the two `halves`."""
        at, eps = jax.lax.stop_gradient(damping), jnp.finfo(self.spec.dtype).eps
        units, told, (a, g) = [half[1] for half in halves], halves[0][2][0], found
        (inputs, outputs), kept = (a.vectors, g.vectors), a.kept[:, :, None] & g.kept[:, None, :]
        values = a.values[:, :, None] * g.values[:, None, :] + jnp.where(told, at, 0)
        inverted = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)

        def coefficients(v: Any) -> Float[Array, "groups inputs outputs"]:
            return inverted * matmul(matmul(inputs.swapaxes(1, 2), self._matrix(v)), outputs)

        def solve(v: Any) -> Any:
            return self._leaves(matmul(matmul(inputs, coefficients(v)), outputs.swapaxes(1, 2)))

        product = self.product()

        def astray(v: Array, x: Array, rest: Array) -> Scalar:
            along, found = jnp.abs(coefficients(self.spec.unravel(v))), self._matrix(self.spec.unravel(x))
            # The part that was projected off keeps the rounding errors of whole columns.
            sizes = [jnp.sqrt(jnp.sum(jnp.square(columns), 1)) for columns in (inputs, outputs)]
            rounded = jnp.sum(sizes[0][:, :, None] * along * sizes[1][:, None, :])
            turned = matmul(a.off.swapaxes(1, 2), found), matmul(found, g.off)
            # The null space is not known exactly: some of the unreachable part of v comes back out of the product.
            leak = self.spec.ravel(solve(solve(product(self.spec.unravel(rest)))), "v")
            return 4 * eps * rounded + norm(leak) + norm(jnp.concatenate([part.reshape(-1) for part in turned]))

        flat = self.spec.ravel(self._leaves(units[0][:, :, None] * units[1][:, None, :]), "units")
        clear = jnp.all(jnp.stack([jnp.all(side.clear) for side in (a, g)]))
        tests = Tests(at, told, clear, jnp.all(kept), flat, astray)
        return applied_once(solve, product, damping, tests, jnp.sum(kept, dtype=jnp.int32), self.spec)

    def inverses(self, largest: Scalar, factorise: Factorise) -> Callable[[Scalar], Inverted]:
        # Compute the residual with the factors, which takes two products; the eigenvectors would need four.
        return partial(self.factorised().inverse_of, self)

    def power_mv(self, v: Any, power: Scalar, damping: Scalar) -> Any:
        left, right = eigenvectors(self.input_side), eigenvectors(Bordered(self.outputs))
        whole = self.by_eigenvectors(left, right)
        slopes = power * whole.powers(whole.values, power - 1, damping)
        spread = slopes, (left[0], right[0]), (left[1].whole(), right[1].whole()), self._matrix(v)
        within = self._leaves(turned_within(self.inputs, self.outputs, *spread))
        return jax.tree.map(jnp.add, whole.power_mv(v, power, damping), within)

    @property
    def sizes(self) -> tuple[int, int]:
        """The sizes of the two factors."""
        return self.input_side.size, self.outputs.shape[-1]

    def shifted_factors(self, damping: Scalar) -> list[tuple[Bordered, Float[Array, " groups"]]]:
        """A and ``pi sqrt(damping)``, G and ``sqrt(damping) / pi``: ``pi`` balances the factors' mean eigenvalues."""
        factors = self.input_side, Bordered(self.outputs)
        a, g = (factor.traces() / factor.size for factor in factors)
        return list(zip(factors, balanced_shifts(a, g, damping, self.sizes), strict=True))

    def inverse_by_roots(self, found: Sequence[Float[Array, "groups m m"]]) -> Callable[[Any], Any]:
        """``(A + pi sqrt(damping) I)^-1 V (G + sqrt(damping) / pi I)^-1``, from the `roots` of the damped factors."""
        a, g = found
        solve = partial(jax.lax.linalg.triangular_solve, lower=True)

        def apply(v: Any) -> Any:
            # LAPACK stores matrices by columns, so the transpose is not copied.
            x = self._matrix(v).swapaxes(1, 2)
            x = solve(g, solve(g, x, left_side=True), left_side=True, transpose_a=True)
            x = solve(a, solve(a, x, left_side=False, transpose_a=True), left_side=False)
            return self._leaves(x.swapaxes(1, 2))

        return apply

    def along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        if basis.layout != self.layout:
            return super().along(basis)
        turns = basis.by_all, basis.outputs
        a, g = (jnp.sum(q * matmul(x, q), 1) for q, x in zip(turns, (self.inputs, self.outputs), strict=True))
        return a[:, :, None] * g[:, None, :]

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> Form:
        spec = self.spec.restrict(keep, treedef)
        if all(keep):
            return dataclasses.replace(self, spec=spec)
        if keep[self.weight]:
            return dataclasses.replace(self, input_side=Bordered(self.input_side.core), weight=0, spec=spec)
        assert self.input_side.corner is not None, "without the weight there is a bias"
        return dataclasses.replace(
            self, input_side=Bordered(self.input_side.corner), layout=self._bias_layout, weight=0, spec=spec
        )

    def turned_to(self, layout: Layout) -> Kronecker | None:
        """The same block in another layout, perhaps with inputs and outputs exchanged; None if that is not possible."""
        if layout == self.layout:
            return self
        if self.has_bias or self.layout.turned() != layout:
            return None
        return dataclasses.replace(self, input_side=Bordered(self.outputs), outputs=self.input_side.core, layout=layout)

    def widened(self, like: Kronecker) -> Kronecker:
        """The block extended to the leaves of another one of the same weight; zero at a bias that only the other has."""
        return dataclasses.replace(
            like, input_side=self.input_side.widened() if like.has_bias else self.input_side, outputs=self.outputs
        )

    def of_diagonal(self, entries: Any) -> Kronecker:
        """The Kronecker product over the same leaves that has the partial traces of a diagonal matrix."""
        a, g = map(jax.vmap(jnp.diag), _partial_traces(self._matrix(entries)))
        return dataclasses.replace(self, input_side=self._side(a), outputs=g)

    def rescaled(self, factors: Sequence[Scalar]) -> Kronecker:
        weight, bias = factors[self.weight], factors[1 - self.weight] if self.has_bias else None
        by_part = Bordered(weight * weight, *(() if bias is None else (weight * bias, bias * bias)))
        return dataclasses.replace(self, input_side=jax.tree.map(jnp.multiply, by_part, self.input_side))

    def scaled(self, factor: Scalar) -> Kronecker:
        return dataclasses.replace(self, outputs=factor * self.outputs, unit=factor * self.unit)


def merged(terms: Sequence[Kronecker]) -> Kronecker:
    r"""One Kronecker product for a sum of Kronecker products over the same leaves: the one with the partial traces of the sum.

    .. math:: A \otimes G, \qquad A \propto \sum_k \mathrm{tr}(G_k) A_k, \quad G \propto \sum_k \mathrm{tr}(A_k) G_k, \qquad
        \mathrm{tr} A\, \mathrm{tr} G = \sum_k \mathrm{tr} A_k\, \mathrm{tr} G_k.

    So the product has the trace of the sum on every leaf, equals the sum if the sum is a Kronecker product, and does not depend
    on the order in which terms are merged. Of all Kronecker products of its trace it is the nearest in relative entropy, as the
    product of marginals is to a joint distribution. Each group is merged by itself.
    """
    if len(terms) == 1:
        return terms[0]
    a = jnp.stack([term.input_side.traces() for term in terms])
    g = jnp.stack([jnp.sum(diagonals(term.outputs), 1) for term in terms])
    total = jnp.sum(g, 0, keepdims=True)
    share = jnp.where(total > 0, g / jnp.where(total > 0, total, 1), 1 / len(terms))
    mean = jnp.sum(share * a, 0, keepdims=True)
    scale = jnp.where(mean > 0, a / jnp.where(mean > 0, mean, 1), 1)
    side = jax.tree.map(lambda *parts: _combined(share, parts), *(term.input_side for term in terms))
    return dataclasses.replace(terms[0], input_side=side, outputs=_combined(scale, [term.outputs for term in terms]))


def _combined(factors: Float[Array, "terms groups"], parts: Sequence[Array]) -> Array:
    """A linear combination, group by group."""
    return functools.reduce(jnp.add, [factor[:, None, None] * part for factor, part in zip(factors, parts, strict=True)])


def _partial_traces(
    values: Float[Array, "groups inputs outputs"],
) -> tuple[Float[Array, "groups inputs"], Float[Array, "groups outputs"]]:
    """The sums over outputs and over inputs, scaled as the factors of one product; the first factor has a mean of one."""
    a, g = jnp.mean(values, 2), jnp.mean(values, 1)
    whole = jnp.mean(a, 1, keepdims=True)
    return jnp.where(whole > 0, a / jnp.where(whole > 0, whole, 1), 1), g


@array_fields("input_side", "outputs", "values", repr=False)
class EigenKronecker(Layer, Spectral):
    """``(Q_A (x) Q_G) diag(values) (Q_A (x) Q_G)^T`` of one layer, with bases and eigenvalues held.

    ``separable`` says that each value is a product of one for the input and one for the output, as in a `Kronecker`. The row of
    a bias in ``Q_A`` is stored separately, as in a `Kronecker`.
    """

    input_side: Rows
    outputs: Float[Array, "groups outputs outputs"]
    values: Float[Array, "groups inputs outputs"]
    layout: Layout
    weight: int
    separable: bool
    spec: ParamSpec

    name = "eigen-Kronecker"

    @property
    def inputs(self) -> Float[Array, "groups inputs inputs"]:
        """``Q_A``, whole."""
        return self.input_side.whole()

    def basis_over(self, places: Sequence[int]) -> Basis:
        """The eigenvectors as a basis, for forms over those of the layer's leaves that are at these places."""
        here = {place: i for i, place in enumerate(places)}
        bias = here.get(1 - self.weight) if self.has_bias else None
        return Basis(self.inputs, self.outputs, self.layout, here.get(self.weight), bias)

    def counted_eigenvalues(self) -> list[tuple[Array, int]]:
        return [(self.values, 1)]

    def apply(self, function: Callable[[Array], Array], v: Any) -> Any:
        inside = function(self.values) * batched(self.input_side.transposed_times(*self._rows(v)), self.outputs)
        return self._from_rows(*self.input_side.times(batched(inside, self.outputs, (2, 2))))

    def factored_inverse(self, damping: Scalar) -> Callable[[Any], Any]:
        """The factored inverse of the `Kronecker` with these eigenvectors."""
        # It does not matter how the size of the values is shared between the factors.
        a, g = _partial_traces(self.values)
        shifts = balanced_shifts(jnp.mean(a, 1), jnp.mean(g, 1), damping, (a.shape[1], g.shape[1]))
        inverted = 1 / ((a + shifts[0][:, None])[:, :, None] * (g + shifts[1][:, None])[:, None, :])
        return partial(self.apply, lambda _: inverted)

    @property
    def stack(self) -> tuple[int, ...]:
        return self.outputs.shape[:-3]

    def as_matrix(self) -> Float[Array, "p p"]:
        bases = jax.vmap(jnp.kron)(self.inputs, self.outputs)
        full = matmul(bases * self.values.reshape(bases.shape[0], 1, -1), bases.swapaxes(1, 2))
        return self._as_matrix(0.5 * (full + full.swapaxes(1, 2)))

    def diagonal(self) -> Any:
        return self._from_rows(*self.input_side.squared().times(batched(self.values, jnp.square(self.outputs), (2, 2))))

    def along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        if basis.layout != self.layout:
            return super().along(basis)
        turns = matmul(self.inputs.swapaxes(1, 2), basis.by_all), matmul(self.outputs.swapaxes(1, 2), basis.outputs)
        inputs, outputs = (jnp.square(turn) for turn in turns)
        return matmul(matmul(inputs.swapaxes(1, 2), self.values), outputs)

    def nearest_kronecker(self, sharing: str) -> Kronecker:
        """The Kronecker product with the same partial traces; the same matrix if the values are separable."""
        a, g = _partial_traces(self.values)
        inputs = matmul(self.inputs * a[:, None, :], self.inputs.swapaxes(1, 2))
        outputs = matmul(self.outputs * g[:, None, :], self.outputs.swapaxes(1, 2))
        one = jnp.ones(inputs.shape[:1], inputs.dtype)
        return Kronecker(self._side(inputs), outputs, one, one, self.layout, self.weight, sharing, self.spec)

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> Form:
        spec = self.spec.restrict(keep, treedef)
        if all(keep):
            return dataclasses.replace(self, spec=spec)
        if keep[self.weight]:
            # Without the bias the inputs have different eigenvectors for each output, so make the matrix.
            return Dense(small_matrix(self, "the weight's part"), self.spec).restrict(keep, treedef)
        values = matmul(jnp.square(self.inputs[:, -1:]), self.values)
        alone = Rows(jnp.ones_like(values[:, :, :1]))
        return EigenKronecker(alone, self.outputs, values, self._bias_layout, 0, True, spec)

    def rescaled(self, factors: Sequence[Scalar]) -> EigenKronecker:
        if self.has_bias:
            raise NotImplementedError(
                f"the layer of {self.spec.paths[self.weight]} has one eigenbasis for weight and bias: in eigen-Kronecker form "
                "each of them cannot have its own damping. Give one number, or use jf.kronecker."
            )
        # The inputs of a layer without a bias are all scaled alike, so that separable values stay separable.
        return dataclasses.replace(self, values=jnp.square(factors[0]) * self.values)

    def scaled(self, factor: Scalar) -> EigenKronecker:
        return dataclasses.replace(self, values=factor * self.values)


@mean_of.register
def _(block: Kronecker, other: Kronecker, share: Scalar) -> Kronecker:
    """The view of the mean of two Fishers, from their views: second moments average, and so does the trace."""
    shares = [x.astype(block.outputs.dtype) for x in (1 - share, share)]

    def mean(quantity: Callable[[Kronecker], Any]) -> Any:
        return jax.tree.map(lambda a, b: shares[0] * a + shares[1] * b, quantity(block), quantity(other))

    moments = Moments(
        mean(lambda of: jax.tree.map(lambda part: of.count[:, None, None] * part, of.input_side)),
        mean(lambda of: of.outputs / jnp.where(of.unit == 0, 1, of.unit)[:, None, None]),
        mean(lambda of: of.count),
        mean(lambda of: of.input_side.traces() * jnp.sum(diagonals(of.outputs), 1)),
        block.layout,
    )
    side, outputs, unit = moments.factors()
    return dataclasses.replace(block, input_side=side, outputs=outputs, count=moments.count, unit=unit)


@mean_of.register
def _(block: EigenKronecker, other: EigenKronecker, share: Scalar) -> EigenKronecker:
    """The mean in the common basis; NaN if the two have different bases."""
    near = float(jnp.finfo(block.values.dtype).eps) ** 0.5
    bases = (jax.tree.leaves((each.input_side, each.outputs)) for each in (block, other))
    same = jnp.stack([jnp.max(jnp.abs(a - b), initial=0.0) <= near for a, b in zip(*bases, strict=True)])
    values = block.values + share.astype(block.values.dtype) * (other.values - block.values)
    return dataclasses.replace(block, values=jnp.where(jnp.all(same), values, jnp.nan))
