r"""Second moments of the factors of a leaf, from which its Kronecker approximations are computed.

A row is ``sum_t a_t (x) g_t``. A position t at which every row of an example has a ``g`` of zero carries no gradient: it is
padding, or a mask removes it from the loss. It adds nothing to a row, and the moments do not count it, whatever its input.

Reference: Eschenhagen et al., Kronecker-factored approximate curvature for modern neural network architectures (NeurIPS 2023),
sections 3.2 (expand) and 3.3 (reduce). If every position carries a gradient, their factors and ours agree up to a scalar: the
product of ours always has the trace of the block, and theirs does only if ``|a|`` and ``|g|`` are independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxfisher._bordered import Bordered
from jaxfisher._engine.forms.arrays import contracted, sum_to
from jaxfisher._engine.forms.layout import Layout, matrix_layout
from jaxfisher._engine.forms.leaf import Leaf
from jaxfisher._engine.forms.product import Product
from jaxfisher._engine.forms.tiles import by_columns
from jaxfisher._linalg import diagonals, matmul
from jaxfisher._pieces import sum_batches
from jaxfisher._pytree import array_fields
from jaxfisher._tree import HIGHEST


@array_fields("inputs", "outputs", "count", "trace")
class Moments:
    """Weighted sums over the rows of a leaf, for its Kronecker approximation; those of several blocks of rows add up.

    If the leaf has a bias, the last input is the constant one whose weight the bias is. Its row is stored separately, and the
    block is that of the whole layer.

    Attributes:
        inputs: ``sum omega a a^T`` over what is counted: positions of examples (expand), or examples (reduce).
        outputs: ``sum omega g g^T`` over the same, and over the rows of an example.
        count: ``sum omega`` over what is counted.
        trace: ``sum omega |D|^2``, the trace of the block of ``S^T diag(omega) S``.
        layout: how the leaf's entries are ordered.
    """

    inputs: Bordered
    outputs: Float[Array, "groups outputs outputs"]
    count: Float[Array, " groups"]
    trace: Float[Array, " groups"]
    layout: Layout

    def factors(self) -> tuple[Bordered, Float[Array, "groups outputs outputs"], Float[Array, " groups"]]:
        r"""``A`` and ``G``, whose Kronecker product approximates the block and has its trace, group by group, and ``c``.

        .. math:: A = \frac{\sum \omega\, a a^T}{\sum \omega}, \qquad G = c \sum \omega\, g g^T, \qquad
            \mathrm{tr} A\, \mathrm{tr} G = \sum \omega\, |D|^2.
        """
        count = _or_one(self.count)
        sizes = _or_one(self.inputs.traces()), _or_one(jnp.sum(diagonals(self.outputs), 1))
        unit, each = self.trace / (sizes[0] / count) / sizes[1], count[:, None, None]
        return jax.tree.map(lambda part: part / each, self.inputs), self.outputs * unit[:, None, None], unit


def _or_one(x: Float[Array, " groups"]) -> Float[Array, " groups"]:
    """``x`` with ones in place of zeros, as a divisor of numbers that are zero there too."""
    return jnp.where(x == 0, 1, x)


def has_moments(leaf: Leaf) -> bool:
    """Whether a leaf is a sum of products in one layout, so that its factors' second moments give a Kronecker approximation."""
    return bool(leaf.forms) and all(not form.unfactored and form.layout == leaf.layout for form in leaf.forms)


class _Factors(NamedTuple):
    """The factors of a leaf's rows, and the positions at which some row of an example has a gradient."""

    left: Float[Array, "n rows groups T inputs"]
    right: Float[Array, "n rows groups T outputs"]
    carrying: Bool[Array, "n 1 groups T"]


def expanded_moments(leaf: Leaf, w: Float[Array, "examples rows"]) -> Moments | None:
    """Kronecker moments that treat each position that carries a gradient as an example; None unless `has_moments`."""
    return _moments(leaf, w, lambda factors: factors)


def reduced_moments(leaf: Leaf, w: Float[Array, "examples rows"]) -> Moments | None:
    """Kronecker moments of ``a``, the mean over the positions of an example that carry a gradient, and ``g``, the sum.

    Examples without such a position are not counted. None unless `has_moments`.
    """

    def reduced(factors: _Factors) -> _Factors:
        left, right, carrying = factors
        count = jnp.sum(carrying, 3, keepdims=True, dtype=left.dtype)
        mean = jnp.sum(jnp.where(carrying[..., None], left, 0), 3, keepdims=True) / jnp.maximum(count, 1)[..., None]
        return _Factors(mean, jnp.sum(right, 3, keepdims=True), count > 0)

    return _moments(leaf, w, reduced)


def _moments(leaf: Leaf, w: Float[Array, "examples rows"], counted: Callable[[_Factors], _Factors]) -> Moments | None:
    if not has_moments(leaf):
        return None

    def piece(leaf: Leaf, w: Array) -> tuple[Any, ...]:
        pairs = products(leaf)
        left, right = _joined([pair.left for pair in pairs]), _joined([pair.right for pair in pairs])
        squares = w[:, :, None, None] * jnp.sum(jnp.square(right), 4)
        factors = _Factors(left, right, jnp.any(squares != 0, 1, keepdims=True))
        trace = _trace(factors, squares, w)
        if leaf.bias:
            trace = trace + _trace_of_sums(right, squares, w)
        factors = counted(factors)
        # An input counts once for all rows of its example.
        mean = jnp.mean(w, 1, keepdims=True) if left.shape[1] == 1 else w / w.shape[1]
        weight = jnp.where(factors.carrying, mean[:, :, None, None], 0)
        inputs, sums = _second_moment(factors.left, weight)
        outputs, _ = _second_moment(factors.right, w[:, :, None, None])
        count = jnp.sum(weight, (0, 1, 3))
        # The bias's input is one at every position that counts, so its moments are the sums of the inputs and the count.
        border = (sums, count) if leaf.bias else ()
        return Bordered(inputs, *(part.reshape(len(count), -1, 1) for part in border)), outputs, count, trace

    inputs, outputs, count, trace = leaf.in_pieces(piece, sum_batches, w)
    return Moments(inputs, outputs, count, trace, leaf.layout)


def products(leaf: Leaf) -> list[Product]:
    """The forms of a leaf that `has_moments`."""
    return [form for form in leaf.made if isinstance(form, Product)]


def _joined(factors: Sequence[Array]) -> Float[Array, "n r b t i"]:
    """The factors of several products as those of more positions."""
    lead: tuple[int, ...] = jnp.broadcast_shapes(*(x.shape[:2] for x in factors))
    return jnp.concatenate([jnp.broadcast_to(x, (*lead, *x.shape[2:])) for x in factors], axis=3)


def _second_moment(
    x: Float[Array, "n r b t i"], w: Float[Array, "n r #b #t"]
) -> tuple[Float[Array, "b i i"], Float[Array, "b i"]]:
    """``sum w x x^T`` over rows and positions, and ``sum w x``.

    The first is symmetric only up to rounding: mirroring it would take as long as computing it.
    """
    if x.shape[2] == 1:
        # As matrices, so that XLA computes the weighted rows of both sums once.
        rows = x.reshape(-1, x.shape[-1])
        weighted = jnp.broadcast_to(sum_to(w, x.shape[:2]), x.shape[:-1]).reshape(-1, 1) * rows
        return matmul(weighted.T, rows)[None], jnp.sum(weighted, 0)[None]
    weighted = sum_to(w, x.shape[:2])[..., None] * x
    return contracted(weighted, x), jnp.sum(weighted, (0, 1, 3))


def _trace_of_sums(right: Float[Array, "n rows b t o"], squares: Float[Array, "n rows b t"], w: Array) -> Float[Array, " b"]:
    """``sum w |sum_t g_t|^2`` over rows, group by group: the trace of the bias's part; `_trace` is that of the weight's."""
    if right.shape[3] > 1:
        squares = jnp.sum(w[:, :, None, None, None] * jnp.square(jnp.sum(right, 3, keepdims=True)), 4)
    return jnp.sum(squares, (0, 1, 3))


def _trace(factors: _Factors, squares: Float[Array, "n rows b t"], w: Float[Array, "n rows"]) -> Float[Array, " b"]:
    """``sum w |sum_t a_t g_t^T|^2`` over rows, group by group; ``squares`` are ``w |g_t|^2``.

    It is computed from inner products of factors or from formed gradients, whichever takes fewer operations.
    """
    left, right, carrying = factors
    positions, inputs, outputs = left.shape[3], left.shape[4], right.shape[4]
    if positions == 1:
        # An input whose square overflows may have a gradient of zero: it must not become a NaN.
        lefts = jnp.where(carrying, jnp.sum(jnp.square(left), 4), 0)
        return jnp.sum(lefts * sum_to(squares, lefts.shape), (0, 1, 3))
    left = jnp.where(carrying[..., None], left, 0)
    # If all rows of an example share the left factors, the inner products of right factors are summed over the rows first.
    shared = left.shape[1] == 1
    rows = right.shape[1] if shared else 1
    if positions * (inputs + rows * outputs) > rows * inputs * outputs:
        return _trace_of_formed(left, right, w)
    lefts, weighted = matmul(left, left.swapaxes(-1, -2)), w[:, :, None, None, None] * right
    if shared:
        rights = jnp.einsum("nrbto,nrbso->nbts", weighted, right, precision=HIGHEST)[:, None]
    else:
        rights = matmul(weighted, right.swapaxes(-1, -2))
    return jnp.sum(lefts * sum_to(rights, left.shape), (0, 1, 3, 4))


def _trace_of_formed(left: Array, right: Array, w: Array) -> Float[Array, " b"]:
    """`_trace` from gradients, formed for a few of their inputs at a time."""
    layout = matrix_layout(left.shape[2], left.shape[4], right.shape[4])
    examples, rows = w.shape
    leaf = Leaf((Product(left, right, layout),), layout.shape, right.dtype, examples, rows)

    def tile(d: Array) -> Array:
        return jnp.einsum("nr,nrbio->b", sum_to(w, d.shape), jnp.square(d), precision=HIGHEST)

    return jnp.sum(by_columns(tile, leaf), 0)
