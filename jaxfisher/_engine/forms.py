r"""Leaf forms: how the gradients of one parameter leaf are held for all rows, and what can be computed from that.

Rows are indexed by (example, row of the example). A factor that is the same for all rows of an example, or for all examples,
has an axis of length one there and is used once. With ``D`` the gradient of a leaf, a row has

.. math:: D_{bio} = \sum_t a_{bti}\, g_{bto}

for a `Product` (b are groups, t the T positions that share the weight), or ``D`` itself for a `Formed` one, whose gradient
is no larger than what it is made of, or could not be cut. A leaf used in several places is the sum of several forms.

A rule of cost decides for each leaf: inner products of gradients come from inner products of factors where
``T^2 (I + O) <= I O``, else from gradients formed tile by tile.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._engine.windows import Windows
from jaxfisher._examples import map_batches, sum_batches
from jaxfisher._linalg import matmul, to_unit

TILE = 2**22
"""How many numbers a temporary may hold before work is done in pieces (16 MiB of float32)."""


Seal = Callable[[Array], Array]
"""What a product with a vector goes through before it is summed: `sealed`, or `unsealed` where that cannot matter."""


def sealed(x: Array) -> Array:
    """The same numbers, as something that XLA does not fuse with the product they come from.

    On CPU (jax 0.10 to 0.12) a product with a vector of equal constants, fused with the sum that follows, reads memory that
    was never written. A barrier does not keep them apart.
    """
    return jnp.where(x == x, x, jnp.nan)  # noqa: PLR0124


def unsealed(x: Array) -> Array:
    """The same numbers: those of a vector that was computed, which is no constant of the program."""
    return x


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a leaf's dimensions are grouped: its entries in the order ``[groups, inputs, outputs]``."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    order: tuple[int, ...]
    groups: int
    inputs: int
    outputs: int

    def matrix(self, leaf: Float[Array, "..."]) -> Float[Array, "... groups inputs outputs"]:
        """A leaf, with any leading axes, as matrices."""
        lead = leaf.shape[: leaf.ndim - len(self.shape)]
        fine = leaf.reshape(*lead, *self.axes)
        fine = fine.transpose(*range(len(lead)), *(len(lead) + i for i in self.order))
        return fine.reshape(*lead, self.groups, self.inputs, self.outputs)

    def leaf(self, matrix: Float[Array, "... groups inputs outputs"]) -> Float[Array, "..."]:
        """The inverse of `matrix`."""
        lead = matrix.shape[:-3]
        fine = matrix.reshape(*lead, *(self.axes[i] for i in self.order))
        back = sorted(range(len(self.order)), key=lambda i: self.order[i])
        fine = fine.transpose(*range(len(lead)), *(len(lead) + i for i in back))
        return fine.reshape(*lead, *self.shape)

    def turned(self) -> Layout:
        """With inputs and outputs the other way round; of one group."""
        split = next(k for k in range(len(self.order) + 1) if math.prod(self.axes[i] for i in self.order[:k]) == self.inputs)
        return Layout(self.shape, self.axes, (*self.order[split:], *self.order[:split]), 1, self.outputs, self.inputs)


@partial(jax.tree_util.register_dataclass, data_fields=("left", "right"), meta_fields=("layout",))
@dataclasses.dataclass(frozen=True)
class Product:
    """Gradients ``sum_t left_t (x) right_t``, with ``left [n, rows, groups, T, inputs]`` and ``right [..., T, outputs]``."""

    left: Float[Array, "n rows groups T inputs"]
    right: Float[Array, "n rows groups T outputs"]
    layout: Layout

    name = "outer product"

    @property
    def positions(self) -> int:
        """How many outer products are summed, T."""
        return int(self.right.shape[3])

    def mv(self, v: Float[Array, "groups inputs outputs"], seal: Seal) -> Float[Array, "n rows"]:
        """``sum_t left_t^T V right_t`` for every row."""
        left, right = self.left, self.right
        # The factor with fewer rows meets the matrix; the other takes only a sum.
        if left.shape[0] * left.shape[1] > right.shape[0] * right.shape[1]:
            return jnp.sum(seal(matmul(right, v.swapaxes(1, 2))) * left, (-3, -2, -1))
        return jnp.sum(seal(_times(left, v)) * right, (-3, -2, -1))

    def rmv(self, w: Float[Array, "n rows"]) -> Float[Array, "groups inputs outputs"]:
        """``sum_rows w sum_t left_t (x) right_t``."""
        left, right = self.left, self.right
        if left.shape[0] * left.shape[1] > right.shape[0] * right.shape[1]:
            left = _weighted(w, left, right.shape)
        else:
            right = _weighted(w, right, left.shape)
        left, right = _sum_to(left, right.shape), _sum_to(right, left.shape)
        return _contracted(left, right)

    def gradient(self) -> Float[Array, "n rows groups inputs outputs"]:
        """The gradients themselves."""
        return matmul(self.left.swapaxes(-1, -2), self.right)

    def columns(self, start: Array, size: int) -> Product:
        """The same for some of the inputs only."""
        left = jax.lax.dynamic_slice_in_dim(self.left, start, size, 4)
        return Product(left, self.right, dataclasses.replace(self.layout, inputs=size))

    def squared(self) -> Float[Array, "n rows"]:
        """``|D|^2`` of every row, from inner products of its own factors."""
        own = [matmul(factor, factor.swapaxes(-1, -2)) for factor in (self.left, self.right)]
        return jnp.sum(own[0] * own[1], (-3, -2, -1))

    def squares(self) -> Product:
        """The product whose gradients are the entrywise squares; exact where T is one."""
        return dataclasses.replace(self, left=jnp.square(self.left), right=jnp.square(self.right))

    def bound(self) -> Scalar:
        """The product of the largest factors in absolute value, times T."""
        left, right = (jnp.max(jnp.abs(factor), initial=0.0) for factor in (self.left, self.right))
        return self.positions * right * left


@partial(jax.tree_util.register_dataclass, data_fields=("indices", "right"), meta_fields=("layout",))
@dataclasses.dataclass(frozen=True)
class Lookup:
    """Gradients of a table whose rows are looked up: ``right_t`` in the row ``indices [n, rows, T]``, of one group.

    The row of an index is one of the layout's inputs. An index that is there twice in one row has been made one: the other
    occurrences have a ``right`` of zero.
    """

    indices: Int[Array, "n rows T"]
    right: Float[Array, "n rows 1 T outputs"]
    layout: Layout

    name = "embedding"

    @property
    def positions(self) -> int:
        """How many rows of the table are looked up, T."""
        return int(self.right.shape[3])

    def mv(self, v: Float[Array, "1 inputs outputs"], seal: Seal) -> Float[Array, "n rows"]:
        """``sum_t V[indices_t] . right_t`` for every row."""
        return jnp.sum(v[0][self.indices] * self.right[:, :, 0], (-2, -1))

    def rmv(self, w: Float[Array, "n rows"]) -> Float[Array, "1 inputs outputs"]:
        """The table to whose rows ``w right_t`` is added."""
        updates = _weighted(w, self.right, self.indices.shape)[:, :, 0]
        updates = jnp.broadcast_to(updates, (*self.indices.shape, updates.shape[-1]))
        table = jnp.zeros((self.layout.inputs, self.layout.outputs), updates.dtype)
        return table.at[self.indices].add(updates)[None]

    def gradient(self) -> Float[Array, "n rows 1 inputs outputs"]:
        """The gradients themselves."""
        hot = jax.nn.one_hot(self.indices, self.layout.inputs, dtype=self.right.dtype, axis=-1)
        return matmul(hot[:, :, None].swapaxes(-1, -2), self.right)

    def columns(self, start: Array, size: int) -> Lookup:
        """The same for some rows of the table only."""
        local = self.indices - start.astype(self.indices.dtype)
        inside = (local >= 0) & (local < size)
        right = jnp.where(inside[:, :, None, :, None], self.right, 0)
        return Lookup(jnp.where(inside, local, 0), right, dataclasses.replace(self.layout, inputs=size))

    def squared(self) -> Float[Array, "n rows"]:
        """``|D|^2`` of every row: no row of the table has two terms."""
        return jnp.sum(jnp.square(self.right), (-3, -2, -1))

    def squares(self) -> Lookup:
        """The lookup whose gradients are the entrywise squares."""
        return dataclasses.replace(self, right=jnp.square(self.right))

    def same(self, other: Lookup) -> Bool[Array, "1 n rows T m rows2 T2"]:
        """Where the indices of two blocks of rows are the same."""
        return (self.indices[:, :, :, None, None, None] == other.indices[None, None, None])[None]

    def picked(self, left: Float[Array, "m rows2 1 T2 inputs"]) -> Float[Array, "1 m rows2 T2 n rows T"]:
        """The entries of left factors at the indices."""
        return left[:, :, 0][..., self.indices][None]

    def bound(self) -> Scalar:
        """The largest entry in absolute value, times T."""
        return self.positions * jnp.max(jnp.abs(self.right), initial=0.0)


@partial(jax.tree_util.register_dataclass, data_fields=("windows", "right"), meta_fields=("layout",))
@dataclasses.dataclass(frozen=True)
class Convolution:
    """A product whose left factors are an image seen through windows; the image is held, windows are made a few at a time."""

    windows: Windows
    right: Float[Array, "n rows groups T outputs"]
    layout: Layout

    name = "convolution"

    @property
    def positions(self) -> int:
        """How many outer products are summed, T."""
        return int(self.right.shape[3])

    def product(self) -> Product:
        """The product, with the windows made."""
        left = jax.vmap(jax.vmap(Windows.array))(self.windows)
        return Product(left.reshape(*left.shape[:4], -1), self.right, self.layout)

    def bound(self) -> Scalar:
        """As `Product.bound`, from the image's largest entry."""
        largest = jnp.max(jnp.abs(self.windows.image), initial=0.0)
        return self.positions * jnp.max(jnp.abs(self.right), initial=0.0) * largest


@partial(jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=("layout",))
@dataclasses.dataclass(frozen=True)
class Formed:
    """Gradients held as they are, ``value [n, rows, *shape]``."""

    value: Float[Array, "n rows ..."]
    layout: Layout

    name = "elementwise"

    def mv(self, v: Float[Array, "groups inputs outputs"], seal: Seal) -> Float[Array, "n rows"]:
        """``D . V`` for every row."""
        return matmul(self.value.reshape(*self.value.shape[:2], -1), self.layout.leaf(v).reshape(-1))

    def rmv(self, w: Float[Array, "n rows"]) -> Float[Array, "groups inputs outputs"]:
        """``sum_rows w D``."""
        w = _sum_to(w, self.value.shape[:2])
        flat = self.value.reshape(w.size if w.shape == self.value.shape[:2] else -1, math.prod(self.value.shape[2:]))
        w = jnp.broadcast_to(w, self.value.shape[:2]).reshape(-1)
        return self.layout.matrix(matmul(w, flat).reshape(self.value.shape[2:]))

    def gradient(self) -> Float[Array, "n rows groups inputs outputs"]:
        """The gradients."""
        return self.layout.matrix(self.value)

    def columns(self, start: Array, size: int) -> Formed:
        """The same for some of the inputs only."""
        part = jax.lax.dynamic_slice_in_dim(self.gradient(), start, size, 3)
        shape = part.shape[2:]
        return Formed(part, Layout(shape, shape, (0, 1, 2), *shape))

    def bound(self) -> Scalar:
        """The largest entry in absolute value."""
        return jnp.max(jnp.abs(self.value), initial=0.0)


Factored = Product | Lookup
"""A form whose inner products come from those of its factors."""
Made = Factored | Formed
"""A form with nothing left to make."""
Form = Made | Convolution


def _sum_to(x: Array, shape: Sequence[int]) -> Array:
    """The sum over leading (n, rows) axes along which ``shape`` has length one."""
    axes = tuple(i for i in (0, 1) if shape[i] == 1 and x.shape[i] != 1)
    return jnp.sum(x, axes, keepdims=True) if axes else x


def _weighted(w: Float[Array, "n r"], x: Float[Array, "n r b t o"], shape: Sequence[int]) -> Array:
    """The sum of ``w x`` over leading (n, rows) axes along which ``shape`` has length one."""
    if shape[1] == 1 and shape[0] == x.shape[0] == w.shape[0] and x.shape[1] == w.shape[1] > 1:
        # As a product of matrices: XLA's CPU backend takes a hundred times as long for a sum along a middle axis.
        return jnp.einsum("nr,nrbto->nbto", w, x, precision=_HIGHEST)[:, None]
    return _sum_to(w[:, :, None, None, None] * x, shape)


def _times(x: Float[Array, "n r b t i"], matrix: Float[Array, "b i o"]) -> Float[Array, "n r b t o"]:
    if matrix.shape[0] == 1:
        return matmul(x.reshape(-1, x.shape[-1]), matrix[0]).reshape(*x.shape[:-1], matrix.shape[-1])
    return jnp.einsum("nrbti,bio->nrbto", x, matrix, precision=_HIGHEST)


def _contracted(left: Float[Array, "n r b t i"], right: Float[Array, "n r b t o"]) -> Float[Array, "b i o"]:
    """``sum left (x) right`` over rows and positions; one of two factors with axes of length one has been summed already."""
    shape = jnp.broadcast_shapes(left.shape[:4], right.shape[:4])
    left, right = (jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in (left, right))
    if shape[2] == 1:
        return matmul(left.reshape(-1, left.shape[-1]).T, right.reshape(-1, right.shape[-1]))[None]
    return jnp.einsum("nrbti,nrbto->bio", left, right, precision=_HIGHEST)


def _inner(x: Float[Array, "n r b t i"], y: Float[Array, "m q b s i"]) -> Float[Array, "b n r t m q s"]:
    """Inner products over the last axis of all pairs of rows and positions, group by group."""
    shape = (x.shape[2], *x.shape[:2], x.shape[3], *y.shape[:2], y.shape[3])
    if shape[0] == 1:
        return matmul(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]).T).reshape(shape)
    x, y = (z.transpose(2, 0, 1, 3, 4).reshape(z.shape[2], -1, z.shape[-1]) for z in (x, y))
    return matmul(x, y.swapaxes(1, 2)).reshape(shape)


def _inner_left(one: Factored, two: Factored, scale: Scalar) -> Float[Array, "b n r t m q s"]:
    """Inner products of left factors times ``scale``; rows of a table are not scaled, but ones and zeros as they are."""
    if isinstance(one, Lookup):
        if isinstance(two, Lookup):
            return one.same(two).astype(scale.dtype)
        return jnp.moveaxis(one.picked(two.left * scale), (1, 2, 3), (4, 5, 6)) * scale
    if isinstance(two, Lookup):
        return two.picked(one.left * scale) * scale
    return _inner(one.left * scale, two.left) * scale


def _inner_factored(one: Factored, two: Factored, scale: Scale, *, bias: bool) -> Float[Array, "n r m q"]:
    """Inner products of ``scale.factor`` times the gradients of two blocks of rows, from those of their factors.

    With a ``bias``, of the gradients of a layer whose last input is one.
    """
    # One side of each product is scaled before and its result after: what is squared stays near one, and nothing large is
    # copied.
    right = _inner(one.right * scale.right, two.right) * scale.right
    left = _inner_left(one, two, scale.left)
    return jnp.sum((left + jnp.square(scale.left) if bias else left) * right, (0, 3, 6))


class Scale(NamedTuple):
    """Numbers that left and right factors are multiplied by; their product is what gradients are multiplied by."""

    left: Scalar
    right: Scalar


class Moments(NamedTuple):
    """Second moments of the factors of a leaf, the statistics of its Kronecker approximation.

    ``inputs (x) outputs`` approximates the leaf's block of ``S^T diag(omega) S``, in the order of ``layout``. Where the leaf
    has a bias, the last input is the one it is the weight of, and the block is that of the layer.
    """

    inputs: Float[Array, "groups inputs inputs"]
    outputs: Float[Array, "groups outputs outputs"]
    layout: Layout


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("forms",),
    meta_fields=("shape", "dtype", "examples", "rows", "why", "layer", "bias"),
)
@dataclasses.dataclass(frozen=True)
class Leaf:
    """The gradients of one parameter leaf for ``examples x rows`` rows: the sum of its forms; no form at all is zero.

    ``why`` says why a gradient was formed although that takes more memory than its factors would. A bias whose gradient is the
    right factor of a weight, summed over positions, is the weight of an input that is always one: ``layer`` of the bias is the
    weight's place among the leaves, and the weight has a ``bias``. Inner products of both then come from those of the weight's
    factors, and its Kronecker moments are those of the inputs with that one at their end.
    """

    forms: tuple[Form, ...]
    shape: tuple[int, ...]
    dtype: Any
    examples: int
    rows: int
    why: str | None = None
    layer: int | None = None
    bias: bool = False

    @property
    def layout(self) -> Layout:
        """The one layout of all forms; of a leaf whose forms differ in theirs, the leaf's own shape."""
        layouts = {form.layout for form in self.forms if not isinstance(form, Formed)}
        return layouts.pop() if len(layouts) == 1 else plain_layout(self.shape)

    @property
    def positions(self) -> int:
        """The number T of outer products an example contributes."""
        return sum(form.positions for form in self.forms if not isinstance(form, Formed))

    @property
    def by_factors(self) -> bool:
        """The rule of cost: whether inner products of gradients come from those of their factors."""
        factored = all(isinstance(form, Factored) and form.layout == self.layout for form in self.forms)
        return factored and self.inner_cost <= self.layout.inputs * self.layout.outputs

    @property
    def inner_cost(self) -> int:
        """Products in one inner product by the factors, ``T^2 (I + O)``; formed gradients take ``I O``."""
        # Inner products of rows of a table are comparisons, which cost next to nothing; those of single numbers, nothing.
        lookups = all(isinstance(form, Lookup) for form in self.forms)
        sides = (self.layout.outputs,) if lookups else (self.layout.outputs, self.layout.inputs)
        return self.positions**2 * sum(side for side in sides if side > 1)

    @property
    def bytes(self) -> int:
        """What is held."""
        return int(sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(self.forms)))

    @property
    def working(self) -> int:
        """How many numbers working with it takes beside what is held: gradients that are formed, windows that are made."""
        formed = self.examples * self.rows * math.prod(self.shape) if self.forms_gradients else 0
        windows = [form.windows.size * form.right.shape[1] for form in self.forms if isinstance(form, Convolution)]
        return 2 * formed + self.examples * sum(windows)

    @property
    def forms_gradients(self) -> bool:
        """Whether inner products are taken of gradients that have to be formed for it."""
        return not self.by_factors and any(not isinstance(form, Formed) for form in self.forms)

    @property
    def has_moments(self) -> bool:
        """Whether it is made of dense factors in one layout, whose second moments are a Kronecker approximation."""
        return bool(self.forms) and all(_is_dense(form) and form.layout == self.layout for form in self.forms)

    @property
    def _made(self) -> list[Made]:
        """The forms, of a leaf whose windows have been made."""
        return [form for form in self.forms if not isinstance(form, Convolution)]

    @property
    def _factored(self) -> list[Factored]:
        return [form for form in self.forms if isinstance(form, Factored)]

    def _common(self) -> Leaf:
        """Every form in the one layout: those that have another are formed."""
        layout = self.layout
        return dataclasses.replace(self, forms=tuple(_in_layout(form, layout) for form in self.forms))

    def _at_once(self) -> int | None:
        """How many examples to work on at a time: fewer than all only for convolutions, whose windows take most memory."""
        sizes = [form.windows.size * form.right.shape[1] for form in self.forms if isinstance(form, Convolution)]
        return max(1, TILE // sum(sizes)) if sizes else None

    def _pieces(self, function: Callable[..., Any], gather: Callable[..., Any], *given: Array) -> Any:
        """``function`` of the leaf, windows made, and of what is given for each example; in pieces where windows are large."""
        arrays, treedef = jax.tree.flatten(self.forms)
        varying = [array.shape[0] == self.examples for array in arrays]

        def piece(*data: Array) -> Any:
            mine, rest = iter(data), iter(array for array, flag in zip(arrays, varying, strict=True) if not flag)
            forms = jax.tree.unflatten(treedef, [next(mine) if flag else next(rest) for flag in varying])
            forms = tuple(form.product() if isinstance(form, Convolution) else form for form in forms)
            examples = data[0].shape[0] if data else self.examples
            return function(dataclasses.replace(self, forms=forms, examples=examples)._common(), *mine)

        data = (*(array for array, flag in zip(arrays, varying, strict=True) if flag), *given)
        return gather(piece, data, self._at_once())

    def mv(self, v: Float[Array, "..."], seal: Seal) -> Float[Array, "examples rows"]:
        """``D . V`` for every row."""
        if not self.forms:
            return jnp.zeros((self.examples, self.rows), self.dtype)

        def product(leaf: Leaf) -> Array:
            parts = [form.mv(leaf.layout.matrix(v), seal) for form in leaf._made]
            return jnp.broadcast_to(_sum(parts), (leaf.examples, leaf.rows))

        return self._pieces(product, map_batches)

    def rmv(self, w: Float[Array, "examples rows"]) -> Float[Array, "..."]:
        """``sum_rows w D``."""
        if not self.forms:
            return jnp.zeros(self.shape, self.dtype)
        return self._pieces(lambda leaf, w: leaf.layout.leaf(_sum([form.rmv(w) for form in leaf._made])), sum_batches, w)

    def gradient(self) -> Float[Array, "examples rows ..."]:
        """The gradients themselves, ``[examples, rows, *shape]``."""
        if not self.forms:
            return jnp.zeros((self.examples, self.rows, *self.shape), self.dtype)

        def formed(leaf: Leaf) -> Array:
            made = leaf.layout.leaf(_sum([form.gradient() for form in leaf._made]))
            return jnp.broadcast_to(made, (leaf.examples, leaf.rows, *self.shape))

        return self._pieces(formed, map_batches)

    def _by_columns(self, function: Callable[..., Any], *others: Leaf) -> Any:
        """``function`` of the gradients of this leaf and others for a few of the inputs at a time, results stacked.

        Inputs are cut so that a tile takes no more than the factors do, or than `TILE` numbers. Zeros fill the last tile.
        """
        leaves = [leaf._ready() for leaf in (self, *others)]
        layout = leaves[0].layout
        held = sum(array.size for leaf in leaves for array in jax.tree.leaves(leaf))
        whole = sum(leaf.examples * leaf.rows for leaf in leaves) * layout.groups * layout.inputs * layout.outputs
        tiles = max(1, min(layout.inputs, math.ceil(whole / max(held, TILE))))
        if tiles == 1:
            return jax.tree.map(
                lambda x: x[None], function(*(_sum([form.gradient() for form in leaf._made]) for leaf in leaves))
            )
        size = math.ceil(layout.inputs / tiles)

        def tile(k: Array) -> Any:
            start = k * size
            # The last tile would reach past the end, where a slice is moved back: what it then repeats is masked.
            first = jnp.minimum(start, layout.inputs - size)
            fresh = first + jnp.arange(size) >= start
            parts = [[form.columns(first, size).gradient() for form in leaf._made] for leaf in leaves]
            return function(*(jnp.where(fresh[:, None], _sum(part), 0) for part in parts))

        return jax.lax.map(tile, jnp.arange(math.ceil(layout.inputs / size)))

    def _ready(self) -> Leaf:
        """With convolutions formed: a kernel's gradients are smaller than the windows."""
        if not any(isinstance(form, Convolution) for form in self.forms):
            return self._common()
        layout = plain_layout(self.shape)
        return dataclasses.replace(self, forms=(Formed(self.gradient(), layout),))

    def scale(self, factor: Scalar) -> Scale:
        """How to multiply gradients by ``factor`` so that left factors are at most one."""
        dense = [form.left for form in self.forms if isinstance(form, Product)]
        if not dense or not self.by_factors or len(dense) < len(self.forms):
            return Scale(jnp.ones((), self.dtype), factor)
        unit = to_unit(*(jnp.max(jnp.abs(left), initial=0.0) for left in dense))
        return Scale(unit, factor / unit)

    def agrees(self, other: Leaf) -> bool:
        """Whether inner products with the other's gradients come from those of both's factors."""
        return self.by_factors and other.by_factors and bool(self.forms and other.forms) and self.layout == other.layout

    def gram(self, other: Leaf, scale: Scale, *, bias: bool) -> Float[Array, "examples rows examples2 rows2"]:
        """Inner products of the gradients of two blocks of rows, the gradients being multiplied by ``scale``.

        With a ``bias``, also those of the bias of the layer.
        """
        shape = (self.examples, self.rows, other.examples, other.rows)
        if not self.forms or not other.forms:
            return jnp.zeros(shape, self.dtype)
        if self.agrees(other):
            return jnp.broadcast_to(self._inner(other, scale, bias=bias), shape)
        mine, theirs = (self, other) if self.layout == other.layout else (self._plain(), other._plain())
        inner = partial(_inner_formed, factor=scale.left * scale.right)
        return jnp.broadcast_to(jnp.sum(mine._by_columns(inner, theirs), 0), shape)

    def _plain(self) -> Leaf:
        """The gradients formed, in the leaf's own shape."""
        return dataclasses.replace(self, forms=(Formed(self.gradient(), plain_layout(self.shape)),))

    def own_gram(self, factor: Scalar) -> Float[Array, "examples rows examples rows"]:
        """Inner products of all pairs of gradients times ``factor``, each gradient being formed once."""
        blocks = jnp.sum(self._by_columns(lambda d: _inner_formed(d, d, factor)), 0)
        return jnp.broadcast_to(blocks, (self.examples, self.rows, self.examples, self.rows))

    def _inner(self, other: Leaf, scale: Scale, *, bias: bool) -> Array:
        counts = [max(math.prod(x.right.shape[k] for k in (0, 1, 3)) for x in leaf._factored) for leaf in (self, other)]
        size = counts[0] * counts[1] * self.layout.groups
        if size <= TILE or self.examples == 1 or self.positions == 1:
            return self._few(other, scale, bias=bias)
        few = max(1, TILE * self.examples // size)
        arrays, treedef = jax.tree.flatten(tuple(_full(form, self.examples) for form in self.forms))

        def some(*arrays: Array) -> Array:
            forms = jax.tree.unflatten(treedef, arrays)
            return dataclasses.replace(self, forms=forms, examples=arrays[0].shape[0])._few(other, scale, bias=bias)

        return map_batches(some, tuple(arrays), few)

    def _few(self, other: Leaf, scale: Scale, *, bias: bool) -> Array:
        pairs = itertools.product(self._factored, other._factored)
        return _sum([_inner_factored(one, two, scale, bias=bias) for one, two in pairs])

    def squared_norms(self) -> Float[Array, "examples rows"]:
        """``|D|^2`` of every row."""
        shape = (self.examples, self.rows)
        if not self.forms:
            return jnp.zeros(shape, self.dtype)
        (form, *more) = self.forms
        if not more and (isinstance(form, Lookup) or (isinstance(form, Product) and self.by_factors)):
            return jnp.broadcast_to(form.squared(), shape)
        squares = self._by_columns(lambda d: jnp.sum(jnp.square(d), (2, 3, 4)))
        return jnp.broadcast_to(jnp.sum(squares, 0), shape)

    def diagonal(self, w: Float[Array, "examples rows"]) -> Float[Array, "..."]:
        """``sum_rows w D^2``, entry by entry."""
        if not self.forms:
            return jnp.zeros(self.shape, self.dtype)
        (form, *more) = self.forms
        if not more and (isinstance(form, Lookup) or (isinstance(form, Product) and form.positions == 1)):
            return form.layout.leaf(form.squares().rmv(w))
        leaf = self._ready()
        layout = leaf.layout

        def tile(d: Array) -> Array:
            weight = _sum_to(w, d.shape[:2])
            return jnp.einsum("nr,nrbio->bio", jnp.broadcast_to(weight, d.shape[:2]), jnp.square(d), precision=_HIGHEST)

        tiles = jnp.moveaxis(leaf._by_columns(tile), 0, 1)
        size, tail = tiles.shape[2], layout.inputs - (tiles.shape[1] - 1) * tiles.shape[2]
        full = tiles[:, :-1].reshape(layout.groups, -1, layout.outputs)
        return layout.leaf(jnp.concatenate([full, tiles[:, -1, size - tail :]], axis=1))

    def bound(self) -> Scalar:
        """A bound on the entries of ``D``, of their order of magnitude; with those of the bias of the layer."""
        if not self.forms:
            return jnp.zeros((), self.dtype)
        whole: Scalar = _sum([form.bound() for form in self.forms])
        if not self.bias:
            return whole
        rights = [
            form.positions * jnp.max(jnp.abs(form.right), initial=0.0) for form in self.forms if not isinstance(form, Formed)
        ]
        return jnp.maximum(whole, _sum(rights))

    def means(self, w: Float[Array, "examples rows"]) -> tuple[tuple[Array, ...], ...]:
        """The weighted means of the arrays of every form, for `shifted`; indices have none."""
        return tuple(
            tuple(_mean(array, w) for array in jax.tree.leaves(form) if jnp.issubdtype(array.dtype, jnp.floating))
            for form in self.forms
        )

    def shifted(self, means: tuple[tuple[Array, ...], ...]) -> Leaf:
        r"""The gradients less a constant, which is near their mean if the means are near those of the factors.

        With ``a = a' + A`` and ``g = g' + G`` the gradient ``a (x) g`` is ``a' (x) g + A (x) g'`` and the constant ``A (x) G``,
        which is left out. What is held is then as small as the deviations are.
        """
        forms = [part for form, mean in zip(self.forms, means, strict=True) for part in _shifted(form, mean)]
        return dataclasses.replace(self, forms=tuple(forms), layer=None, bias=False)

    def outer(self) -> tuple[Float[Array, "examples inputs"], Float[Array, "examples rows outputs"], Layout] | None:
        """One left factor an example and one right factor a row, where that is what the leaf is; None if it is not.

        A gradient that is formed is a right factor whose left one is one.
        """
        (form,) = self.forms if len(self.forms) == 1 else (None,)
        if isinstance(form, Formed):
            right = jnp.broadcast_to(form.value, (self.examples, self.rows, *self.shape))
            layout = Layout(self.shape, self.shape, tuple(range(len(self.shape))), 1, 1, math.prod(self.shape))
            return jnp.ones((self.examples, 1), self.dtype), right.reshape(self.examples, self.rows, -1), layout
        if not isinstance(form, Product) or form.positions * form.layout.groups != 1:
            return None
        if form.left.shape[1] != 1:
            return None
        left = jnp.broadcast_to(form.left[:, 0, 0, 0], (self.examples, form.layout.inputs))
        return left, jnp.broadcast_to(form.right[:, :, 0, 0], (self.examples, self.rows, form.layout.outputs)), form.layout

    def times(self, factor: Scalar) -> Leaf:
        """The gradients times a number, no longer those of one layer with a bias."""

        def scaled(form: Form) -> Form:
            if isinstance(form, Formed):
                return dataclasses.replace(form, value=form.value * factor)
            return dataclasses.replace(form, right=form.right * factor)

        return dataclasses.replace(self, forms=tuple(map(scaled, self.forms)), layer=None, bias=False)

    def masked(self, live: Bool[Array, " examples"]) -> Leaf:
        """The same gradients, exactly zero for the examples that are not live."""

        def zeroed(array: Array) -> Array:
            return jnp.where(live.reshape(-1, *(1,) * (array.ndim - 1)), array, 0)

        def held(form: Form) -> Form:
            if isinstance(form, Formed):
                return dataclasses.replace(form, value=zeroed(form.value))
            # The right factor, since that of a layer's weight is the gradient of its bias as well.
            return dataclasses.replace(form, right=zeroed(form.right))

        return dataclasses.replace(self, forms=tuple(map(held, self.forms)))

    def take(self, examples: slice) -> Leaf:
        """The rows of some examples."""
        count = len(range(*examples.indices(self.examples)))
        forms = jax.tree.map(lambda x: x[examples] if x.shape[0] == self.examples else x, self.forms)
        return dataclasses.replace(self, forms=forms, examples=count)

    def _moments(self, w: Float[Array, "examples rows"], of: Callable[[Leaf, Array], tuple[Array, Array]]) -> Moments | None:
        if not self.has_moments:
            return None
        inputs, outputs = self._pieces(of, sum_batches, w)
        return Moments(inputs, outputs, self.layout)

    def expanded_moments(self, w: Float[Array, "examples rows"]) -> Moments | None:
        """Kronecker moments with positions as if they were examples: ``E[1/T sum_t a_t a_t^T]`` and ``E[sum_t g_t g_t^T]``.

        None for a leaf that is no dense outer product. Reference: Eschenhagen et al. (NeurIPS 2023), KFAC-expand.
        """

        def of(leaf: Leaf, w: Array) -> tuple[Array, Array]:
            left, right = leaf._joined()
            mean = jnp.mean(w, 1, keepdims=True) / left.shape[3]
            return _second_moment(left, mean if left.shape[1] == 1 else w / w.shape[1] / left.shape[3]), _second_moment(
                right, w
            )

        return self._moments(w, of)

    def reduced_moments(self, w: Float[Array, "examples rows"]) -> Moments | None:
        """Kronecker moments of sums over positions: ``E[a a^T]`` of ``a = mean_t a_t`` and ``E[g g^T]`` of ``g = sum_t g_t``.

        None for a leaf that is no dense outer product. Reference: Eschenhagen et al. (NeurIPS 2023), KFAC-reduce.
        """

        def of(leaf: Leaf, w: Array) -> tuple[Array, Array]:
            left, right = leaf._joined()
            left, right = jnp.mean(left, 3, keepdims=True), jnp.sum(right, 3, keepdims=True)
            mean = jnp.mean(w, 1, keepdims=True)
            return _second_moment(left, mean if left.shape[1] == 1 else w / w.shape[1]), _second_moment(right, w)

        return self._moments(w, of)

    def _joined(self) -> tuple[Array, Array]:
        """Left and right factors of all forms, joined along the positions."""
        products = [form for form in self.forms if isinstance(form, Product)]
        return _joined([self._homogeneous(form.left) for form in products]), _joined([form.right for form in products])

    def _homogeneous(self, left: Float[Array, "n r b t i"]) -> Float[Array, "n r b t inputs"]:
        """Left factors with the one that the bias of the layer is the weight of."""
        return jnp.concatenate([left, jnp.ones((*left.shape[:-1], 1), left.dtype)], -1) if self.bias else left

    def rotated_diagonal(self, moments: Moments, w: Float[Array, "examples rows"]) -> Float[Array, "groups inputs outputs"]:
        """``sum_rows w (Q_a^T D Q_g)^2`` in bases given as the fields of a `Moments`: the eigenvalues of EKFAC.

        Reference: George et al., Fast approximate natural gradient descent in a Kronecker-factored eigenbasis (NeurIPS 2018).
        """
        inputs, outputs, layout = moments
        shape = (layout.groups, inputs.shape[-1], layout.outputs)

        def of(leaf: Leaf, w: Array) -> Array:
            turned = tuple(
                Product(
                    _times(leaf._homogeneous(form.left), inputs),
                    _times(form.right, outputs),
                    Layout(shape, shape, (0, 1, 2), *shape),
                )
                for form in leaf.forms
                if isinstance(form, Product)
            )
            return dataclasses.replace(leaf, forms=turned, shape=shape, bias=False).diagonal(w)

        return self._pieces(of, sum_batches, w)


def _joined(factors: Sequence[Array]) -> Float[Array, "n r b t i"]:
    lead: tuple[int, ...] = jnp.broadcast_shapes(*(x.shape[:2] for x in factors))
    return jnp.concatenate([jnp.broadcast_to(x, (*lead, *x.shape[2:])) for x in factors], axis=3)


def _is_dense(form: Form) -> bool:
    return isinstance(form, Convolution | Product)


def _second_moment(x: Float[Array, "n r b t i"], w: Float[Array, "n r"]) -> Float[Array, "b i i"]:
    """``sum w x x^T`` over rows and positions, symmetric up to rounding: to mirror it would take as long as to make it."""
    w = _sum_to(w, x.shape[:2])[:, :, None, None, None]
    return _contracted(*jnp.broadcast_arrays(w * x, x))


def _mean(array: Array, w: Float[Array, "n r"]) -> Array:
    """The weighted mean over examples and rows, with axes of length one for them."""
    weight = _sum_to(w, array.shape[:2])
    weight = jnp.broadcast_to(weight / jnp.sum(weight), array.shape[:2])
    return jnp.einsum("nr,nr...->...", weight, array, precision=_HIGHEST)[None, None]


def _shifted(form: Form, means: tuple[Array, ...]) -> tuple[Form, ...]:
    if isinstance(form, Formed):
        return (dataclasses.replace(form, value=form.value - means[0]),)
    if isinstance(form, Convolution):
        constant = dataclasses.replace(form.windows, image=means[0])
        moving = dataclasses.replace(form.windows, image=form.windows.image - means[0])
        return Convolution(moving, form.right, form.layout), Convolution(constant, form.right - means[1], form.layout)
    if isinstance(form, Lookup):
        return (form,)
    return (
        dataclasses.replace(form, left=form.left - means[0]),
        Product(means[0], form.right - means[1], form.layout),
    )


def _inner_formed(mine: Array, theirs: Array, factor: Scalar) -> Float[Array, "n r m q"]:
    flat = [x.reshape(x.shape[0] * x.shape[1], -1) for x in (mine, theirs)]
    return (matmul(flat[0] * factor, flat[1].T) * factor).reshape(*mine.shape[:2], *theirs.shape[:2])


def _full(form: Any, examples: int) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (examples, *x.shape[1:])), form)


def _in_layout(form: Form, layout: Layout) -> Form:
    if form.layout == layout or isinstance(form, Convolution):
        return form
    value = form.value if isinstance(form, Formed) else form.layout.leaf(form.gradient())
    return Formed(value, layout)


def plain_layout(shape: tuple[int, ...]) -> Layout:
    """A leaf as a column: nothing is known of its structure."""
    return Layout(shape, shape, tuple(range(len(shape))), 1, math.prod(shape), 1)


def _sum(parts: Sequence[Any]) -> Any:
    return sum(parts[1:], start=parts[0])


_HIGHEST = jax.lax.Precision.HIGHEST


def outer_moment(
    leaves: Sequence[tuple[Float[Array, "n inputs"], Float[Array, "n rows outputs"], Layout]],
    w: Float[Array, "n rows"],
    factor: Scalar,
) -> Float[Array, "p p"]:
    """``factor^2 sum_rows w D D^T`` over all leaves, of leaves that have one left factor an example and one right factor a row.

    The rows of an example are summed first, ``M = sum_rows w g g^T``, so that they cost nothing in ``sum_n (a a^T) (x) M``.
    """
    units = [to_unit(jnp.max(jnp.abs(left), initial=0.0)) for left, _, _ in leaves]
    leaves = [(left * u, right * (factor / u), layout) for (left, right, layout), u in zip(leaves, units, strict=True)]
    blocks: list[list[Array]] = [[jnp.zeros(())] * len(leaves) for _ in leaves]
    for i, (left, right, layout) in enumerate(leaves):
        blocks[i][i] = _moment_block(left, right, layout, w)
        for j in range(i + 1, len(leaves)):
            blocks[i][j] = _cross_block(leaves[i], leaves[j], w)
            blocks[j][i] = blocks[i][j].T
    return jnp.block(blocks)


def _moment_block(left: Array, right: Array, layout: Layout, w: Array) -> Float[Array, "size size"]:
    """One leaf's block: pairs of inputs by pairs of outputs, each pair once."""
    inputs, outputs = _Pairs(layout.inputs), _Pairs(layout.outputs)

    def some(left: Array, right: Array, w: Array) -> Array:
        metric = jnp.einsum("nro,nrq->noq", w[:, :, None] * right, right, precision=_HIGHEST)
        a = left[:, inputs.first] * left[:, inputs.second]
        return matmul(a.T, metric[:, outputs.first, outputs.second])

    few = max(1, TILE // (inputs.count + layout.outputs**2))
    pairs = sum_batches(some, (left, right, w), few)
    full = pairs[inputs.index][:, :, outputs.index].transpose(0, 2, 1, 3)
    return _in_leaf_order(full, layout, layout)


def _cross_block(one: tuple[Array, Array, Layout], two: tuple[Array, Array, Layout], w: Array) -> Float[Array, "size size2"]:
    """The block of two leaves."""
    layouts = one[2], two[2]

    def some(a: Array, g: Array, b: Array, h: Array, w: Array) -> Array:
        metric = jnp.einsum("nro,nrq->noq", w[:, :, None] * g, h, precision=_HIGHEST)
        inputs = (a[:, :, None] * b[:, None, :]).reshape(a.shape[0], -1)
        return matmul(inputs.T, metric.reshape(metric.shape[0], -1))

    few = max(1, TILE // (layouts[0].inputs * layouts[1].inputs + layouts[0].outputs * layouts[1].outputs))
    sums = sum_batches(some, (*one[:2], *two[:2], w), few)
    shape = (layouts[0].inputs, layouts[1].inputs, layouts[0].outputs, layouts[1].outputs)
    return _in_leaf_order(sums.reshape(shape).transpose(0, 2, 1, 3), *layouts)


def _in_leaf_order(block: Float[Array, "i o j q"], rows: Layout, columns: Layout) -> Float[Array, "size size2"]:
    block = columns.leaf(block[:, :, None]).reshape(*block.shape[:2], -1)
    block = rows.leaf(jnp.moveaxis(block, -1, 0)[:, None]).reshape(block.shape[-1], -1)
    return block.T


class _Pairs:
    """Pairs of indices below a size, each once; ``index[i, j]`` is where the pair of i and j is."""

    def __init__(self, size: int) -> None:
        self.first, self.second = np.triu_indices(size)
        self.count = len(self.first)
        self.index = np.zeros((size, size), int)
        self.index[self.first, self.second] = self.index[self.second, self.first] = np.arange(self.count)
