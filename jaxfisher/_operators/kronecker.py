r"""Kronecker-factored Fishers: the block of a layer's weight as ``A (x) G``, or with exact eigenvalues in its eigenbasis.

A layer's score is ``sum_t a_t (x) g_t`` (inputs, output cotangents, over the positions that share the weight). KFAC takes the
mean of products for the product of means. Bias and weight of a layer are one block: the bias is the weight of an input that is
always one.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeGuard

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar

from jaxfisher._engine import Layout, Moments
from jaxfisher._inverse import Factorise, Solved, SolveInfo
from jaxfisher._linalg import cholesky, matmul, norm, resolved
from jaxfisher._once import once
from jaxfisher._operators.base import VIEW, Inverted, Operator, Provenance, View, as_operator, nonnegative
from jaxfisher._operators.block import BlockDiagonal, part_of
from jaxfisher._operators.dense import Dense
from jaxfisher._operators.diagonal import diagonal
from jaxfisher._operators.spectral import Spectral
from jaxfisher._scores import Scores
from jaxfisher._tree import ParamSpec, cast_like, check_function


class _Layer(Operator):
    """The block of one layer; its vectors are lists of a weight and perhaps a bias, in the parameters' order."""

    layout: Layout
    weight: int
    """The place of the weight in the lists."""

    @property
    def has_bias(self) -> bool:
        """Whether the last input is the one that the bias is the weight of."""
        return len(self.spec.shapes) > 1

    def _matrix(self, v: Any) -> Float[Array, "groups inputs outputs"]:
        leaves = jax.tree.leaves(v)
        matrix = self.layout.matrix(leaves[self.weight])
        if not self.has_bias:
            return matrix
        return jnp.concatenate([matrix, leaves[1 - self.weight].reshape(1, 1, -1)], axis=1)

    def _leaves(self, matrix: Float[Array, "groups inputs outputs"]) -> Any:
        leaves = [self.layout.leaf(matrix[:, : self.layout.inputs])]
        if self.has_bias:
            bias = matrix[:, -1].reshape(self.spec.shapes[1 - self.weight])
            leaves.insert(1 - self.weight, bias)
        return self.spec.tree(leaves)

    def _per_input(self, factors: Sequence[Scalar]) -> Float[Array, " inputs"]:
        """A factor for each leaf as one for each input."""
        parts = [jnp.full(self.layout.inputs, 1, self.spec.dtype) * factors[self.weight]]
        if self.has_bias:
            parts.append(jnp.ones(1, self.spec.dtype) * factors[1 - self.weight])
        return jnp.concatenate(parts)

    def _as_matrix(self, blocks: Float[Array, "groups size size"]) -> Float[Array, "p p"]:
        """Dense blocks in the order of the parameters."""
        groups, size, _ = blocks.shape
        full = (jnp.eye(groups, dtype=blocks.dtype)[:, None, :, None] * blocks[:, :, None, :]).reshape(groups * size, -1)
        shape = (groups, -1, self.layout.outputs)
        order = self.spec.ravel(self._leaves(jnp.arange(groups * size).reshape(shape).astype(self.spec.dtype)), "v").astype(int)
        return full[order][:, order]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("inputs", "outputs"),
    meta_fields=("layout", "weight", "sharing", "spec", "provenance"),
)
@dataclasses.dataclass(frozen=True, repr=False)
class Kronecker(_Layer):
    """``A (x) G`` of one layer, both factors held; a running mean is one of the factors, as KFAC has it."""

    inputs: Float[Array, "groups inputs inputs"]
    outputs: Float[Array, "groups outputs outputs"]
    layout: Layout
    weight: int
    sharing: str
    spec: ParamSpec
    provenance: Provenance

    averages = True
    held = ("inputs", "outputs")

    @property
    def form(self) -> str:  # type: ignore[override]
        """Kronecker, and how positions that share the weight were counted."""
        return f"Kronecker ({self.sharing})"

    def as_matrix(self) -> Float[Array, "p p"]:
        return self._as_matrix(jax.vmap(jnp.kron)(self.inputs, self.outputs))

    def diagonal(self) -> Any:
        inputs, outputs = _diagonals(self.inputs), _diagonals(self.outputs)
        return self._leaves(inputs[:, :, None] * outputs[:, None, :])

    def linearised(self) -> Callable[[Any], Any]:
        return lambda v: self._leaves(matmul(matmul(self.inputs, self._matrix(v)), self.outputs))

    def trace(self) -> Scalar:
        return jnp.sum(jnp.sum(_diagonals(self.inputs), 1) * jnp.sum(_diagonals(self.outputs), 1))

    def frobenius_norm(self) -> Scalar:
        norms = jax.vmap(lambda a, g: norm(a.reshape(-1)) * norm(g.reshape(-1)))(self.inputs, self.outputs)
        return norm(norms)

    def factorised(self) -> EigenKronecker:
        """By its eigenvectors, those of the factors."""
        (a, inputs), (g, outputs) = _eigh(self.inputs), _eigh(self.outputs)
        values = a[:, :, None] * g[:, None, :]
        return EigenKronecker(inputs, outputs, values, self.layout, self.weight, True, self.spec, self.provenance)

    def eigvalsh(self) -> Float[Array, " p"]:
        return self.factorised().eigvalsh()

    def rank(self) -> Any:
        return self.factorised().rank()

    def _logdet(self, damping: Scalar) -> Scalar:
        return self.factorised()._logdet(damping)

    def inverses(self, largest: Scalar, factorise: Factorise) -> Callable[[Scalar], Inverted]:
        # The residual is against the factors: two products, where the eigenvectors would take four.
        return partial(self.factorised().inverse_of, self.linearised())

    def _power_mv(self, v: Any, power: Scalar, damping: Scalar) -> Any:
        return self.factorised()._power_mv(v, power, damping)

    def factored_inverse(self, damping: Scalar) -> Callable[[Any], Any]:
        """``(A + pi sqrt(damping) I)^-1 V (G + sqrt(damping) / pi I)^-1``, ``pi`` balancing the factors' mean eigenvalues."""
        sizes = self.inputs.shape[-1], self.outputs.shape[-1]
        shifts = _shifts(jnp.mean(_diagonals(self.inputs), 1), jnp.mean(_diagonals(self.outputs), 1), damping, sizes)
        parts = zip((self.inputs, self.outputs), shifts, strict=True)
        a, g = (jax.vmap(lambda x, s: cholesky(x + s * jnp.eye(len(x), dtype=x.dtype)))(*part) for part in parts)
        solve = partial(jax.lax.linalg.triangular_solve, lower=True)

        def apply(v: Any) -> Any:
            # LAPACK has matrices by columns: of the transpose no copy is made.
            x = self._matrix(v).swapaxes(1, 2)
            x = solve(g, solve(g, x, left_side=True), left_side=True, transpose_a=True)
            x = solve(a, solve(a, x, left_side=False, transpose_a=True), left_side=False)
            return self._leaves(x.swapaxes(1, 2))

        return apply

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> Operator:
        spec = self.spec.restrict(keep, treedef)
        if all(keep):
            return dataclasses.replace(self, spec=spec)
        if keep[self.weight]:
            size = self.layout.inputs
            return dataclasses.replace(self, inputs=self.inputs[:, :size, :size], weight=0, spec=spec)
        return Dense(self.inputs[0, -1, -1] * self.outputs[0], spec, self.provenance)

    def rescaled(self, factors: Sequence[Scalar]) -> Kronecker:
        by_input = self._per_input(factors)
        return dataclasses.replace(self, inputs=by_input[None, :, None] * self.inputs * by_input[None, None, :])

    def _scaled(self, factor: Any) -> Kronecker:
        return dataclasses.replace(self, outputs=factor * self.outputs, provenance=self.provenance.times())


def _shifts(
    a: Float[Array, " groups"], g: Float[Array, " groups"], damping: Scalar, sizes: tuple[int, int]
) -> tuple[Float[Array, " groups"], Float[Array, " groups"]]:
    """What is added to each factor, from their mean eigenvalues and sizes: at least what keeps a singular one invertible."""
    balance = jnp.sqrt(jnp.where((a > 0) & (g > 0), a / jnp.where(g > 0, g, 1), 1))
    shifts = jnp.sqrt(damping) * balance, jnp.sqrt(damping) / balance
    rounding = [10 * size * jnp.finfo(mean.dtype).eps * mean for mean, size in zip((a, g), sizes, strict=True)]
    held = [jnp.maximum(shift, least) for shift, least in zip(shifts, rounding, strict=True)]
    return jnp.where(held[0] > 0, held[0], 1), jnp.where(held[1] > 0, held[1], 1)


def _diagonals(x: Float[Array, "groups m m"]) -> Float[Array, "groups m"]:
    # As a slice with a stride, which compiles in half the time of a masked sum.
    return x.reshape(x.shape[0], -1)[:, :: x.shape[-1] + 1]


def _eigh(x: Float[Array, "groups m m"]) -> tuple[Float[Array, "groups m"], Float[Array, "groups m m"]]:
    """Eigenvalues, those inside rounding error zero, and eigenvectors of positive semi-definite factors."""
    values, vectors = jnp.linalg.eigh(x, symmetrize_input=False)
    largest = jnp.max(jnp.abs(values), -1, keepdims=True)
    return resolved(values, jnp.zeros((), x.dtype), largest, x.shape[-1]), vectors


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("inputs", "outputs", "values"),
    meta_fields=("layout", "weight", "separable", "spec", "provenance"),
)
@dataclasses.dataclass(frozen=True, repr=False)
class EigenKronecker(_Layer, Spectral):
    """``(Q_A (x) Q_G) diag(values) (Q_A (x) Q_G)^T`` of one layer, bases and eigenvalues held.

    ``separable`` says that the values are products of one for the input and one for the output: that it is a `Kronecker`.
    """

    inputs: Float[Array, "groups inputs inputs"]
    outputs: Float[Array, "groups outputs outputs"]
    values: Float[Array, "groups inputs outputs"]
    layout: Layout
    weight: int
    separable: bool
    spec: ParamSpec
    provenance: Provenance

    form = "eigen-Kronecker"

    def _eigenvalues(self) -> list[tuple[Array, int]]:
        return [(self.values, 1)]

    def _apply(self, function: Callable[[Array], Array], v: Any) -> Any:
        inside = matmul(matmul(self.inputs.swapaxes(1, 2), self._matrix(v)), self.outputs)
        return self._leaves(matmul(matmul(self.inputs, function(self.values) * inside), self.outputs.swapaxes(1, 2)))

    def factored_inverse(self, damping: Scalar) -> Callable[[Any], Any]:
        """That of the `Kronecker` that it is."""
        # Up to a number, and how it is shared between the factors does not matter.
        a, g = jnp.mean(self.values, 2), jnp.mean(self.values, 1)
        whole = jnp.mean(a, 1)[:, None]
        g = jnp.where(whole > 0, g / jnp.where(whole > 0, whole, 1), 0)
        shifts = _shifts(jnp.mean(a, 1), jnp.mean(g, 1), damping, (a.shape[1], g.shape[1]))
        inverted = 1 / ((a + shifts[0][:, None])[:, :, None] * (g + shifts[1][:, None])[:, None, :])
        return partial(self._apply, lambda _: inverted)

    def as_matrix(self) -> Float[Array, "p p"]:
        bases = jax.vmap(jnp.kron)(self.inputs, self.outputs)
        full = matmul(bases * self.values.reshape(bases.shape[0], 1, -1), bases.swapaxes(1, 2))
        return self._as_matrix(0.5 * (full + full.swapaxes(1, 2)))

    def diagonal(self) -> Any:
        squares = [jnp.square(x) for x in (self.inputs, self.outputs)]
        return self._leaves(matmul(matmul(squares[0], self.values), squares[1].swapaxes(1, 2)))

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> Operator:
        if all(keep):
            return dataclasses.replace(self, spec=self.spec.restrict(keep, treedef))
        raise ValueError(
            f"the layer of {self.spec.paths[self.weight]} cannot be parted from its bias in eigen-Kronecker form: a part of it "
            "has other eigenvectors. Restrict the Fisher first, and take the view of that."
        )

    def rescaled(self, factors: Sequence[Scalar]) -> EigenKronecker:
        if self.has_bias:
            raise NotImplementedError(
                f"the layer of {self.spec.paths[self.weight]} has one eigenbasis for weight and bias: in eigen-Kronecker form "
                "they cannot have a damping each. Give one number, or use jf.kronecker."
            )
        # Inputs of a layer without a bias are all scaled alike: what was separable still is.
        return dataclasses.replace(self, values=jnp.square(factors[0]) * self.values)

    def _scaled(self, factor: Any) -> EigenKronecker:
        return dataclasses.replace(self, values=factor * self.values, provenance=self.provenance.times())


def kronecker(fisher: Operator, rest: View = diagonal) -> BlockDiagonal:
    r"""KFAC with positions as if they were examples (*expand*): the block of each layer as a Kronecker product.

    .. math:: F_\ell \approx A \otimes G, \qquad A = E\Big[\tfrac1T \sum_t a_t a_t^T\Big], \quad
        G = E\Big[\sum_t g_t g_t^T\Big],

    with ``a`` a layer's inputs (with a last one for its bias), ``g`` the derivatives of the log-density by its outputs, T the
    positions that share the weight; E is the Fisher's mean over examples, and over outputs or draws. Exact for one example of a
    layer without sharing, and for deep linear networks with Gaussian outputs. Any framework: layers are read off the program.

    Args:
        fisher: an operator held as scores, or implicit.
        rest: the view of the leaves that are no dense product (scales, tables, lone biases): `jaxfisher.diagonal`, or
            `jaxfisher.block_diagonal` for an exact block a leaf. The `repr` says how many there are, `jaxfisher.explain` why.

    Returns:
        A block-diagonal operator, one block a layer. Its running mean is one of the factors.

    Raises:
        TypeError: ``fisher`` is not an operator held as scores.

    Reference: Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature (ICML 2015),
    section 3; Eschenhagen et al., Kronecker-factored approximate curvature for modern neural network architectures (NeurIPS
    2023), section 3.2.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(x @ p["w"] + p["b"], jnp.ones(2))
    >>> F = jf.exact_fisher(model)({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, jnp.ones((4, 3)))
    >>> jf.kronecker(F)
    Fisher(exact, mean over 4, params 8, block-diagonal: 1 Kronecker (expand))
    """
    fisher = as_operator(fisher, "kronecker").viewed
    scores = fisher.rows("kronecker")
    return _layered(fisher, scores, scores.expanded_moments(), "expand", rest)


def kronecker_reduce(fisher: Operator, rest: View = diagonal) -> BlockDiagonal:
    r"""KFAC with a layer's positions taken together (*reduce*), for weights shared over positions that are then averaged.

    .. math:: A = E[\bar a \bar a^T], \quad \bar a = \tfrac1T \sum_t a_t, \qquad
        G = E[\bar g \bar g^T], \quad \bar g = \sum_t g_t.

    Arguments and errors are those of `jaxfisher.kronecker`, with which it agrees where nothing is shared.

    Reference: Eschenhagen et al. (NeurIPS 2023), section 3.3.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(jnp.mean(x @ p["w"], 0), jnp.ones(2))
    >>> F = jf.exact_fisher(model)({"w": jnp.ones((3, 2))}, jnp.ones((4, 5, 3)))
    >>> jf.kronecker_reduce(F)
    Fisher(exact, mean over 4, params 6, block-diagonal: 1 Kronecker (reduce))
    """
    fisher = as_operator(fisher, "kronecker_reduce").viewed
    scores = fisher.rows("kronecker_reduce")
    return _layered(fisher, scores, scores.reduced_moments(), "reduce", rest)


def _layered(fisher: Operator, scores: Scores, moments: Sequence[Moments | None], sharing: str, rest: View) -> BlockDiagonal:
    check_function("rest", rest, VIEW)
    mass = jnp.where(scores.mass > 0, scores.mass, 1)
    blocks: list[Operator] = []
    members: list[tuple[int, ...]] = []
    for k, made in enumerate(moments):
        if made is not None:
            group = tuple(i for i, owner in enumerate(scores.layers) if k in (i, owner))
            spec = _spec_of(fisher.spec, group)
            # Both factors carry the sum of the weights, and the product is to carry it once.
            factors = _symmetric(made.inputs / mass), _symmetric(made.outputs)
            blocks.append(Kronecker(*factors, made.layout, group.index(k), sharing, spec, fisher.provenance))
            members.append(group)
    return _with_rest(fisher, blocks, members, rest)


def _symmetric(x: Float[Array, "groups m m"]) -> Float[Array, "groups m m"]:
    return 0.5 * (x + x.swapaxes(1, 2))


def _spec_of(spec: ParamSpec, group: Sequence[int]) -> ParamSpec:
    return spec.restrict(tuple(i in group for i in range(len(spec.paths))), jax.tree.structure([0] * len(group)))


def _with_rest(fisher: Operator, blocks: list[Operator], members: list[tuple[int, ...]], rest: View) -> BlockDiagonal:
    inside = {i for group in members for i in group}
    others = tuple(i for i in range(len(fisher.spec.paths)) if i not in inside)
    if others:
        made = as_operator(rest(part_of(fisher, others)), "kronecker: `rest`")
        if isinstance(made, BlockDiagonal):
            blocks += made.blocks
            members += [tuple(others[i] for i in group) for group in made.members]
        else:
            blocks.append(made)
            members.append(others)
    return BlockDiagonal(tuple(blocks), tuple(members), fisher.spec, fisher.provenance)


def eigen_kronecker(fisher: Operator, basis: BlockDiagonal | None = None, rest: View = diagonal) -> BlockDiagonal:
    r"""EKFAC: the eigenbasis of KFAC with the exact second moments along it as eigenvalues, from the same scores.

    .. math:: F_\ell \approx (Q_A \otimes Q_G)\, \mathrm{diag}(\lambda)\, (Q_A \otimes Q_G)^T, \qquad
        \lambda = E\big[(Q_A^T D\, Q_G)^2\big],

    D being the score of the layer. Of all diagonals in that basis it is the one nearest to the block in Frobenius norm: never
    farther than KFAC.

    Args:
        fisher: an operator held as scores, or implicit.
        basis: a `jaxfisher.kronecker` view whose eigenvectors are used, perhaps an older one, or an eigen-Kronecker one, whose
            are known; None makes one of ``fisher``.
        rest: as in `jaxfisher.kronecker`.

    Returns:
        A block-diagonal operator, one block a layer. It has no running mean: bases differ from batch to batch.

    Raises:
        TypeError: ``fisher`` is not an operator held as scores, or ``basis`` is no Kronecker view.
        ValueError: ``basis`` is over other parameters.

    Reference: George et al., Fast approximate natural gradient descent in a Kronecker-factored eigenbasis (NeurIPS 2018),
    section 3.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(x @ p["w"] + p["b"], jnp.ones(2))
    >>> F = jf.exact_fisher(model)({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, jnp.ones((4, 3)))
    >>> jf.eigen_kronecker(F)
    Fisher(exact, mean over 4, params 8, block-diagonal: 1 eigen-Kronecker)
    """
    fisher = as_operator(fisher, "eigen_kronecker").viewed
    scores = fisher.rows("eigen_kronecker")
    if basis is None:
        basis = kronecker(fisher, rest)
    if not isinstance(basis, BlockDiagonal):
        raise TypeError(f"eigen_kronecker: `basis` is {basis!r}; expected jf.kronecker(fisher) or jf.eigen_kronecker(fisher).")
    fisher.same_parameters(basis, f"eigen_kronecker: cannot view {fisher} in `basis`, {basis}")
    chosen = [
        (group, block.factorised() if isinstance(block, Kronecker) else block)
        for group, block in zip(basis.members, basis.blocks, strict=True)
        if isinstance(block, Kronecker | EigenKronecker)
    ]
    bases: list[Moments | None] = [None] * len(fisher.spec.paths)
    for group, block in chosen:
        bases[group[block.weight]] = Moments(block.inputs, block.outputs, block.layout)
    exact = scores.rotated_diagonals(bases)
    blocks: list[Operator] = []
    for group, block in chosen:
        values = exact[group[block.weight]]
        assert values is not None, "a leaf with a basis has moments along it"
        blocks.append(dataclasses.replace(block, values=values, separable=False, provenance=fisher.provenance))
    return _with_rest(fisher, blocks, [group for group, _ in chosen], rest)


def factored_damping(fisher: Operator, v: chex.ArrayTree, damping: chex.Numeric) -> tuple[Any, SolveInfo]:
    r"""KFAC's own, approximate damping, a solver for `jaxfisher.solve`: each factor is damped instead of the product.

    .. math:: \Big(A + \pi \sqrt{\lambda} I\Big)^{-1} V \Big(G + \tfrac{\sqrt\lambda}{\pi} I\Big)^{-1}, \qquad
        \pi^2 = \frac{\mathrm{tr} A / \dim A}{\mathrm{tr} G / \dim G}.

    This is *not* ``(F + damping I)^-1``: it is the inverse of ``A (x) G`` plus the damping plus cross terms. It needs two
    Cholesky factors a layer where the exact one needs two eigendecompositions. Blocks of other forms are damped exactly. The
    residual in the report is that of ``(F + damping I) x = v``, and shows the difference: ``converged`` is that of an exact
    solve, and rarely true.

    Args:
        fisher: a `jaxfisher.kronecker` view.
        v: a pytree shaped like the parameters.
        damping: ``> 0``. One that is too small for the dtype to tell counts as the least that can be told.

    Raises:
        TypeError: ``fisher`` is no Kronecker view.
        ValueError: a ``damping`` of zero or below.

    Reference: Martens and Grosse (ICML 2015), section 6.3.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda w, x: jf.Normal(x @ w, jnp.ones(2))
    >>> F = jf.kronecker(jf.exact_fisher(model)(jnp.ones((2, 2)), 2.0 * jnp.eye(2)))  # A = 2 I, G = I
    >>> x, _ = jf.solve(F, jnp.ones((2, 2)), damping=1.0, solver=jf.factored_damping)
    >>> print(x.round(4)[0])  # 1 / ((2 + sqrt(2)) (1 + 1 / sqrt(2))), where (F + I)^-1 is 1/3
    [0.1716 0.1716]
    """
    if not isinstance(fisher, BlockDiagonal) or not any(map(_is_kronecker, fisher.blocks)):
        raise TypeError(f"factored_damping: {fisher} has no Kronecker factors to damp; expected jf.kronecker(fisher).")
    if isinstance(damping, (numbers.Real, np.ndarray, np.generic)) and float(damping) == 0:
        raise ValueError(
            "factored_damping: `damping` is 0, without which factors may be singular. Give a number above zero, or leave the "
            "solver out: jf.solve(F, v, 0.0) is then exact."
        )
    x, info = _by_factors(fisher, fisher._vector(v), nonnegative("damping", damping, fisher.spec.dtype))
    return cast_like(x, v), info


@once
def _by_factors(fisher: BlockDiagonal, v: Any, damping: Scalar) -> tuple[Any, SolveInfo]:
    """`factored_damping` without its checks."""
    blocks = [
        block.factored_inverse(damping) if _is_kronecker(block) else partial(_solution, block.inverse(damping))
        for block in fisher.blocks
    ]
    product = fisher.linearised()

    def inverse(v: Any) -> Solved:
        x = fisher._join([block(part) for block, part in zip(blocks, fisher._split(v), strict=True)])
        rest = jax.tree.map(lambda b, f, y: b - f - damping * y, v, product(x), x)
        return Solved(x, rest, fisher.full_rank)

    return fisher.report(inverse, v, damping)


def _is_kronecker(block: Operator) -> TypeGuard[Kronecker | EigenKronecker]:
    return isinstance(block, Kronecker) or (isinstance(block, EigenKronecker) and block.separable)


def _solution(inverse: Inverted, v: Any) -> Any:
    return inverse(v).x
