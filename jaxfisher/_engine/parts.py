"""Parts: from the terms of one leaf's gradient to the forms that store it.

A term of two factors becomes a `Product`, a `Lookup` or a `Convolution`, and every other term a `Formed` gradient. Everything
here is about one row of one example: the leading axes come from ``vmap``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxfisher._engine.axes import Axis, Steps, dim
from jaxfisher._engine.forms import Convolution, Form, Formed, Layout, Lookup, Product
from jaxfisher._engine.machine import Output
from jaxfisher._engine.terms import Factor, Term, Unformed, fold, laid_out, seen, whole
from jaxfisher._engine.windows import Windows
from jaxfisher._linalg import matmul
from jaxfisher._tree import HIGHEST


class Source(NamedTuple):
    """A value of the program, and the steps through its entries that stay while everything else is summed over.

    If the entries are those of one layer in a stack, ``place`` is its position there; ``start`` is the first of the entries.

    The reference to the value keeps Python from giving its `id` to another object.
    """

    value: Any
    steps: Steps
    place: int | None = None
    start: int = 0

    @property
    def key(self) -> tuple[int, Steps, int | None, int]:
        """The key by which two sources are compared."""
        return id(self.value), self.steps, self.place, self.start


Sources = tuple[Source, ...]


class Part(NamedTuple):
    """One form of a leaf, for one row, without the leading axes.

    Attributes:
        form: the form.
        flags: the flags of each of the form's arrays.
        place: its positions in a leaf that is used part by part; empty for a form of the whole leaf.
        left: the values of the program that the left factors are, entry for entry, with nothing summed over; None if there are
            no such values. There are several if a leaf is used several times.
        right: likewise for the right factors.
        gradient: the values of the program that a formed gradient is a sum over; None if there are no such values.
    """

    form: Form
    flags: tuple[int, ...]
    place: tuple[int, ...] = ()
    left: Sources | None = None
    right: Sources | None = None
    gradient: Sources | None = None


class LeafParts(NamedTuple):
    """The parts of one leaf, and the reason if some of its gradient had to be formed."""

    parts: tuple[Part, ...]
    why: str | None


def leaf_parts(output: Output, shape: tuple[int, ...], dtype: Any) -> LeafParts:
    """The forms of one leaf's gradient, in the statistics dtype. A leaf without entries has none."""
    if 0 in shape:
        return LeafParts((), None)
    value, why = output.value, output.reason
    found = value.terms if isinstance(value, Unformed) else (whole(value, output.flags, why),)
    products: list[Part] = []
    formed: list[Part] = []
    for term in _rows_of_tables(found if all(map(_is_column, found)) else tuple(map(fold, found))):
        if _is_one_factor(term):
            formed.append(_formed(term, shape))
            why = why or next(factor.reason for factor in term.factors if factor.place is None)
            continue
        part = _product(term, shape)
        if part is None:
            # The term is a product of three factors, say: form the whole value in the ordinary way.
            array = value.formed() if isinstance(value, Unformed) else value
            plain = Part(Formed(array.astype(dtype)), (output.flags,))
            return LeafParts((plain,), "it is not a sum of products of two factors")
        products.append(part)
    cast = [part._replace(form=_cast(part.form, dtype)) for part in (*products, *formed)]
    return LeafParts(_joined(cast), why)


def _is_one_factor(term: Term) -> bool:
    """Whether a term is one ordinary factor, perhaps at one position of a stack."""
    rest = [factor for factor in term.factors if factor.place is None]
    return len(rest) == 1 and rest[0].plain is not None and len(term.factors) <= 2


def _rows_of_tables(found: Sequence[Term]) -> Sequence[Term]:
    """The terms, with those at one position of a stack as lookups in a table, unless they fill at least half of the stack."""
    placed = [term for term in found if len(term.factors) == 2 and _is_one_factor(term)]
    made = {}
    for term in placed:
        (at,) = (factor for factor in term.factors if factor.place is not None)
        if at.hot is not None and 2 * len(placed) < at.hot.size and sum(len(axes) for axes in term.dims) > 1:
            hot = dataclasses.replace(at, place=None)
            made[id(term)] = Term(tuple(hot if factor is at else factor for factor in term.factors), term.dims)
    return [made.get(id(term), term) for term in found]


def _is_column(term: Term) -> bool:
    """Whether one of two factors has all of the leaf's axes and the other none, as for the weight of a single output."""
    if len(term.factors) != 2 or any(factor.plain is None or factor.place is not None for factor in term.factors):
        return False
    leaf = {axis for axes in term.dims for axis in axes}
    return sorted(len(leaf & set(factor.axes)) for factor in term.factors) == [0, len(leaf)] != [0, 0]


def _cast(form: Form, dtype: Any) -> Form:
    """A form with its numbers, such as integer inputs, in the statistics dtype. The positions of a lookup stay integers."""
    if isinstance(form, Lookup):
        return dataclasses.replace(form, right=form.right.astype(dtype))
    made: Form = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.complexfloating) else x.astype(dtype), form)
    return made


def _formed(term: Term, shape: tuple[int, ...]) -> Part:
    """A term of one factor as a formed gradient."""
    (factor,) = (factor for factor in term.factors if factor.place is None)
    order = [axis for axes in term.dims for axis in axes]
    kept, array = order, laid_out(Term((factor,), tuple((axis,) for axis in order)))
    for at in (at for at in term.factors if at.hot is not None):
        here = [np.arange(axis.size) == at.place if axis is at.hot else np.ones(axis.size, bool) for axis in order]
        array = jnp.where(functools.reduce(np.logical_and.outer, here), array, 0)
        # The entries of a bias are in the order of its weight's only if the position in the stack comes first.
        kept = [axis for axis in order if axis is not at.hot or axis is not order[0]]
    source = _source(factor, kept) if all(axis in factor.axes for axis in kept) else None
    return Part(Formed(array.reshape(shape)), (factor.flags,), gradient=_at(source, term))


def _at(sources: Sources | None, term: Term) -> Sources | None:
    """The sources, at the position of the term in a stack if it has one."""
    (place,) = [factor.place for factor in term.factors if factor.place is not None] or (None,)
    return sources and tuple(source._replace(place=place) for source in sources)


def _source(factor: Factor, kept: Sequence[Axis]) -> Sources | None:
    """The source of a factor of which these axes are kept; None unless each of them goes through the source value in steps."""
    _, value, steps, start = factor.source
    wanted = [axis for axis in kept if axis.size > 1]
    if value is None or any(axis not in steps for axis in wanted):
        return None
    joined: list[tuple[int, int]] = []
    for length, stride in (step for axis in wanted for step in steps[axis]):
        # Two steps that go through the entries like one become one, however the axes were split and merged on the way.
        if joined and joined[-1][1] == length * stride:
            length *= joined.pop()[0]
        joined.append((length, stride))
    return (Source(value, tuple(joined), start=start),)


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair:
    """A product of two factors, with its axes sorted by their role in the leaf.

    ``places`` are the axes along which the leaf is used part by part, at ``positions`` known at trace time; ``groups`` are axes
    of the leaf that both factors have; ``shared`` are the axes of both that are summed over.
    """

    left: Factor
    right: Factor
    places: tuple[Axis, ...]
    positions: tuple[int, ...]
    groups: tuple[Axis, ...]
    shared: tuple[Axis, ...]
    inputs: tuple[Axis, ...]
    outputs: tuple[Axis, ...]
    shape: tuple[int, ...]
    order: tuple[Axis, ...]

    @property
    def layout(self) -> Layout:
        """How the leaf's dimensions are grouped."""
        sides = ((*self.places, *self.groups), self.inputs, self.outputs)
        return Layout(
            self.shape,
            tuple(axis.size for axis in self.order),
            tuple(self.order.index(axis) for side in sides for axis in side),
            *(math.prod(axis.size for axis in side) for side in sides),
        )

    @property
    def flags(self) -> tuple[int, int]:
        """The flags of both factors."""
        return self.left.flags, self.right.flags

    def left_array(self) -> Array:
        """The left factors, ``[groups, T, inputs]``."""
        return laid_out(Term((seen(self.left),), (self.groups, self.shared, self.inputs)))

    def right_array(self) -> Array:
        """The right factors, ``[groups, T, outputs]``."""
        return laid_out(Term((self.right,), (self.groups, self.shared, self.outputs)))

    def source(self, factor: Factor, kept: Sequence[Axis]) -> Sources | None:
        """The source of one factor, if the factor has all the shared axes of the product and no other axis to sum over."""
        kept, own = (*self.groups, *kept), {axis for axis in factor.axes if axis.size > 1}
        return _source(factor, kept) if own == {axis for axis in (*kept, *self.shared) if axis.size > 1} else None


def _product(term: Term, shape: tuple[int, ...]) -> Part | None:
    """A term of two factors, and perhaps places, as a part; None for any other term."""
    pair = _sorted(term, shape)
    if pair is None:
        return None
    if pair.places:
        return _placed(pair)
    if pair.left.hot is not None:
        return _lookup(pair)
    if isinstance(pair.left.array, Windows):
        return _convolution(pair, pair.left.array)
    return _outer(pair, pair.left_array(), pair.right_array())


def _sorted(term: Term, shape: tuple[int, ...]) -> _Pair | None:
    """The term as a pair of factors; None if it does not have two factors, or if neither holds an ordinary array."""
    placed = [factor for factor in term.factors if factor.place is not None]
    rest = [factor for factor in term.factors if factor.place is None]
    if len(rest) != 2:
        return None
    order = tuple(axis for axes in term.dims for axis in axes)
    first, second = rest
    groups = tuple(axis for axis in order if axis in first.over and axis in second.over)
    own = [tuple(axis for axis in order if axis in factor.over and axis not in groups) for factor in rest]
    put = tuple(factor.hot for factor in placed if factor.hot is not None)
    loose = tuple(axis for axis in order if not any(axis in factor.over for factor in rest) and axis not in put)
    shared = tuple(axis for axis in first.over if axis in second.over and axis not in order)
    # The left factor is the one with the leaf's first dimension, so that all uses of a leaf agree; a lookup is always left.
    swap = second.plain is None or (first.plain is not None and _before(own[1], own[0], order))
    left, right, inputs, outputs = (second, first, own[1], own[0]) if swap else (first, second, own[0], own[1])
    if right.plain is None or any(axis not in order for axis in put):
        return None
    if isinstance(left.array, Windows):
        # In the order of the windows, so that the windows need not be made.
        inputs = tuple(axis for axis in left.axes if axis in inputs)
    places = tuple(factor.place or 0 for factor in placed)
    return _Pair(left, right, put, places, groups, shared, inputs, (*outputs, *loose), shape, order)


def _before(a: Sequence[Axis], b: Sequence[Axis], order: Sequence[Axis]) -> bool:
    return bool(a) and (not b or order.index(a[0]) < order.index(b[0]))


def _outer(pair: _Pair, left: Array, right: Array, place: tuple[int, ...] = ()) -> Part:
    """A sum of outer products. If one side has length one, the sum over positions is taken: a vector, or a formed gradient."""
    layout = pair.layout
    column = _is_vector(layout)
    if layout.inputs > 1 < layout.outputs or (column and left.shape[-2] == 1):
        found = (pair.source(pair.left, pair.inputs), pair.source(pair.right, pair.outputs))
        at = place[0] if place else None
        sources = [known and tuple(source._replace(place=at) for source in known) for known in found]
        if len(pair.places) > 1:
            sources = []  # the positions of a bias may be in another order
        return Part(Product(left, right, layout), pair.flags, place, *sources)
    formed = matmul(left.swapaxes(-1, -2), right)
    flags = pair.left.flags | pair.right.flags
    if not column:
        return Part(Formed(layout.leaf(formed)), (flags,))
    return _column(formed, layout, flags, place)


def _is_vector(layout: Layout) -> bool:
    """Whether a leaf's gradients are a single column or row."""
    return layout.groups == 1 and layout.inputs * layout.outputs > 1 == min(layout.inputs, layout.outputs)


def _column(formed: Array, layout: Layout, flags: int, place: tuple[int, ...]) -> Part:
    """A gradient ``[1, inputs, outputs]`` with one side of length one, as the product of that vector and the number one."""
    one = jnp.ones((1, 1, 1), formed.dtype)
    if layout.outputs == 1:
        return Part(Product(formed.swapaxes(-1, -2), one, layout), (flags, 0), place)
    return Part(Product(one, formed, layout), (0, flags), place)


def _placed(pair: _Pair) -> Part | None:
    """A product for one part of a leaf, such as one layer's weight in a stack of weights: a group among empty groups."""
    if pair.left.hot is not None:
        return None
    index, empty = 0, math.prod(axis.size for axis in pair.places)
    for position, axis in zip(pair.positions, pair.places, strict=True):
        index = index * axis.size + position
    left, right = (_among_zeros(array, index, empty) for array in (pair.left_array(), pair.right_array()))
    return _outer(pair, left, right, (index,))


def _among_zeros(array: Array, index: int, count: int) -> Array:
    """The array's groups as block ``index`` of ``count`` blocks of groups; the other blocks are zero."""
    size = array.shape[0]
    zeros = jnp.zeros((count * size, *array.shape[1:]), array.dtype)
    return zeros.at[index * size : (index + 1) * size].set(array)


def _lookup(pair: _Pair) -> Part | None:
    """Rows of a table. Lookups of the same row are merged into the first one, so that squares need no cross terms."""
    left, right = pair.left, pair.right_array()
    assert not isinstance(left.array, Windows)
    if pair.groups or pair.inputs != (left.hot,) or any(axis not in pair.shared for axis in left.axes if axis.size > 1):
        return None
    axes = [axis for axis in left.axes if axis in pair.shared]
    indices = left.array.reshape([axis.size for axis in axes])
    indices = indices.transpose([axes.index(axis) for axis in pair.shared]).reshape(-1)
    merged = _merged_by_sorting if indices.size >= _LONG else _merged_by_comparison
    flags = (left.flags, left.flags | pair.right.flags)
    return Part(Lookup(indices, merged(indices, right), pair.layout), flags)


_LONG = 128
"""The number of lookups from which sorting is faster on two CPU cores: by 1.5 to 6 there, by 9 to 20 at 1024.

At eight lookups of narrow rows it is four times slower. Comparing takes memory for the square of the number, sorting does not.
"""


def _merged_by_comparison(indices: Int[Array, " T"], right: Float[Array, "groups T outputs"]) -> Array:
    """The sum of the right factors of equal indices at the first of these; zeros at the others."""
    same = indices[:, None] == indices[None, :]
    first = ~jnp.any(jnp.tril(same, -1), axis=1)
    summed = jnp.einsum("st,gto->gso", same.astype(right.dtype), right, precision=HIGHEST)
    return jnp.where(first[:, None], summed, jnp.zeros((), right.dtype))


def _merged_by_sorting(indices: Int[Array, " T"], right: Float[Array, "groups T outputs"]) -> Array:
    """`_merged_by_comparison` without a table of all pairs: each factor is added where its index occurs first."""
    order = jnp.argsort(indices, stable=True)
    ordered = indices[order]
    begins = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    start = jax.lax.cummax(jnp.where(begins, jnp.arange(begins.size, dtype=jnp.int32), 0))
    return jnp.zeros_like(right).at[:, order[start]].add(right[:, order])


def _convolution(pair: _Pair, windows: Windows) -> Part:
    """A convolution, which stores the image, if each axis of the windows has its usual role; else a product of the windows."""
    group, position, *inputs = pair.left.axes
    roles = (pair.groups, (group,)), (pair.shared, (position,)), (pair.inputs, inputs)
    # The groups may be summed over, as for a kernel that all groups share.
    if any(dim(*found) != dim(*usual) for found, usual in roles):
        return _outer(pair, pair.left_array(), pair.right_array())
    source = pair.source(pair.right, pair.outputs)
    return Part(Convolution(windows, pair.right_array(), pair.layout), pair.flags, right=source)


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts of one leaf, merged where possible: products with one layout become positions of one, formed ones add up."""
    made: list[Part] = []
    for part in parts:
        for i, other in enumerate(made):
            together = _together(other, part)
            if together is not None:
                made[i] = together
                break
        else:
            made.append(part)
    return tuple(made)


def _together(a: Part, b: Part) -> Part | None:
    one, two = a.form, b.form
    if isinstance(one, Product) and isinstance(two, Product) and one.layout == two.layout and _is_vector(one.layout):
        # Both are products of a vector and a number, which add up to one vector.
        whole = jnp.add(*(x.left.swapaxes(-1, -2) * x.right for x in (one, two)))
        return _column(whole, one.layout, a.flags[0] | a.flags[1] | b.flags[0] | b.flags[1], (*a.place, *b.place))
    if isinstance(one, Formed) and isinstance(two, Formed) and a.flags[0] | b.flags[0] in (a.flags[0], b.flags[0]):
        return Part(Formed(one.value + two.value), (a.flags[0] | b.flags[0],), gradient=_both(a.gradient, b.gradient))
    if a.flags != b.flags:
        return None
    if not (isinstance(one, Product) and isinstance(two, Product)) or one.layout != two.layout:
        return None
    apart = a.place and b.place and not set(a.place) & set(b.place) and one.right.shape == two.right.shape
    join = jnp.add if apart else lambda x, y: jnp.concatenate([x, y], axis=1)
    form = Product(join(one.left, two.left), join(one.right, two.right), one.layout)
    return Part(form, a.flags, (*a.place, *b.place), _both(a.left, b.left), _both(a.right, b.right))


def _both(one: Sources | None, two: Sources | None) -> Sources | None:
    return None if one is None or two is None else (*one, *two)
