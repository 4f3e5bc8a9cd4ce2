r"""From a row function to leaf forms: trace it on one example, cut its program, run what is left on all examples and rows.

Nothing here is done twice: what does not depend on the row of an example (the forward pass, the input factors) is computed
once for the example, and what depends on neither once for all.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxfisher._engine.cut import EXAMPLE, ROW, Value, run
from jaxfisher._engine.forms import Convolution, Form, Formed, Layout, Leaf, Lookup, Product, plain_layout
from jaxfisher._engine.program import Program, flatten
from jaxfisher._engine.terms import Axis, Factor, Term, Unformed, Windows, fold, seen, whole
from jaxfisher._examples import num_examples, shape_of_one
from jaxfisher._rows import Rows
from jaxfisher._tree import ParamSpec


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """The program of one row, and how many rows an example has."""

    program: Program
    rows: int


def trace(rows: Rows, params: chex.ArrayTree, data: tuple[Any, ...]) -> Traced:
    """The program ``(params, seed, *example) -> (aux, *gradients)`` of a row function."""
    one = shape_of_one(data)
    seeds = jax.eval_shape(rows.seeds, params, *one)
    count = jax.tree.leaves(seeds)[0].shape[0]
    closed = jax.make_jaxpr(lambda *args: rows.row(*args))(params, shape_of_one(seeds), *one)
    return Traced(flatten(closed), count)


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("treedef", "flags", "whys", "layers"))
@dataclasses.dataclass(frozen=True)
class _Skeleton:
    """What is known of the factors without their numbers: it comes out of ``vmap`` beside them."""

    treedef: Any
    flags: tuple[int, ...]
    whys: tuple[str | None, ...]
    layers: tuple[int | None, ...]


def leaf_forms(
    traced: Traced, rows: Rows, params: chex.ArrayTree, data: tuple[Any, ...], spec: ParamSpec
) -> tuple[tuple[Array, ...], tuple[Leaf, ...]]:
    """The row function's auxiliary output for every example, and the forms of every parameter leaf."""
    groups = (0, ROW, EXAMPLE, EXAMPLE | ROW)
    examples = num_examples(data, "data")

    def one_row(seed: Any, *example: Any) -> Any:
        return _one_row(traced.program, params, seed, example, spec)

    def one_example(*example: Any) -> Any:
        seeds = rows.seeds(params, *example)
        axes = {flag: 0 if flag & ROW else None for flag in groups}
        return jax.vmap(one_row, (0, *(None for _ in example)), (axes, None, None))(seeds, *example)

    axes = {flag: 0 if flag & EXAMPLE else None for flag in groups}
    arrays, skeleton, aux = jax.vmap(one_example, 0, (axes, None, 0), axis_size=examples)(*data)
    streams = {flag: iter(arrays[flag]) for flag in groups}
    full = [_with_axes(next(streams[flag]), flag) for flag in skeleton.flags]
    forms = jax.tree.unflatten(skeleton.treedef, full)
    biases = [k in skeleton.layers for k in range(len(forms))]
    known = zip(forms, spec.shapes, skeleton.whys, skeleton.layers, biases, strict=True)
    return aux, tuple(Leaf(parts, shape, spec.dtype, examples, traced.rows, *rest) for parts, shape, *rest in known)


def _with_axes(array: Array, flag: int) -> Array:
    """With leading axes (examples, rows), of length one where the array does not depend on them."""
    missing = [axis for axis, bit in ((0, EXAMPLE), (1, ROW)) if not flag & bit]
    return jnp.expand_dims(array, missing)


def _one_row(program: Program, params: chex.ArrayTree, seed: Any, example: tuple[Any, ...], spec: ParamSpec) -> Any:
    """The factors of one row by what they depend on, their skeleton, and the auxiliary output."""
    given = [(leaf, flag) for tree, flag in ((params, 0), (seed, ROW), (example, EXAMPLE)) for leaf in jax.tree.leaves(tree)]
    outputs = run(program, [jnp.asarray(leaf) for leaf, _ in given], [flag for _, flag in given])
    split = len(outputs) - len(spec.shapes)
    aux = tuple(value.formed() if isinstance(value, Unformed) else value for value, _, _ in outputs[:split])
    leaves = [
        _parts(value, flag, why, shape, spec.dtype)
        for (value, flag, why), shape in zip(outputs[split:], spec.shapes, strict=True)
    ]
    parts, layers = _with_layers([parts for parts, _ in leaves])
    made = tuple(tuple(form for form, *_ in some) for some in parts)
    flags = tuple(flag for some in parts for _, flags, *_ in some for flag in flags)
    arrays, treedef = jax.tree.flatten(made)
    grouped: dict[int, list[Array]] = {flag: [] for flag in (0, ROW, EXAMPLE, EXAMPLE | ROW)}
    for array, flag in zip(arrays, flags, strict=True):
        grouped[flag].append(array)
    return grouped, _Skeleton(treedef, flags, tuple(why for _, why in leaves), layers), aux


def _with_layers(leaves: list[list[Part]]) -> tuple[list[list[Part]], tuple[int | None, ...]]:
    """For every leaf that is a bias, the weight it belongs to; weights turned so that their right factors are the outputs'.

    A bias is a leaf whose gradient is a factor of a weight, summed over positions.
    """
    weights: dict[Any, tuple[int, int]] = {}
    for k, parts in enumerate(leaves):
        for form, _, _, sources in parts if len(parts) == 1 else []:
            if isinstance(form, Formed) or form.layout.groups != 1:
                continue
            for side, (source, width) in enumerate(zip(sources, (form.layout.inputs, form.layout.outputs), strict=True)):
                # Each position has its own entries of the source, which is neither repeated nor summed.
                if source is not None and source.size == form.right.shape[-2] * width:
                    weights.setdefault(source.key, (k, side))
    turned = list(leaves)
    layers: list[int | None] = [None] * len(leaves)
    for b, parts in enumerate(leaves):
        for form, _, _, (_, source) in parts if len(parts) == 1 else []:
            if not isinstance(form, Formed) or source is None or source.key not in weights:
                continue
            k, side = weights.pop(source.key)
            # One bias for each weight: a second one is held for itself.
            if k not in layers:
                layers[b] = k
                turned[k] = leaves[k] if side else [_turned(*leaves[k][0])]
    return turned, tuple(layers)


def _turned(form: Form, flags: tuple[int, ...], place: tuple[int, ...], sources: Sources) -> Part:
    """A product with its factors the other way round."""
    assert isinstance(form, Product)
    return Product(form.right, form.left, form.layout.turned()), flags[::-1], place, sources[::-1]


class Source(NamedTuple):
    """A value of the program that a leaf's gradient, or its right factor, is taken from, and which of its axes stay.

    Axes of length one do not count. The value is held so that its identity stays its own.
    """

    value: Array
    axes: tuple[int, ...]

    @property
    def key(self) -> tuple[int, tuple[int, ...]]:
        """What two sources are compared by."""
        return id(self.value), self.axes

    @property
    def size(self) -> int:
        """Number of entries of the value."""
        return int(self.value.size)


def _source(factor: Factor, outputs: list[Axis]) -> Source | None:
    """The source of a factor with these output axes; None if it lacks one of them."""
    value, axes = factor.source
    wanted = [axis for axis in outputs if axis.size > 1]
    if factor.plain is None or any(axis not in axes for axis in wanted):
        return None
    long = [axis for axis, size in zip(axes, value.shape, strict=True) if size > 1]
    return Source(value, tuple(long.index(axis) for axis in wanted))


Sources = tuple[Source | None, Source | None]
_NOWHERE: Sources = (None, None)
Part = tuple[Form, tuple[int, ...], tuple[int, ...], Sources]
"""A form of one row, without its leading axes; the flags of its arrays; where it is placed, of a leaf used in parts; and what
of the program its left and right factors are. The right factor of a gradient that is formed is the gradient."""


def _parts(value: Value, flag: int, why: str | None, shape: tuple[int, ...], dtype: Any) -> tuple[list[Part], str | None]:
    """The forms of one leaf's gradient in the dtype of statistics, and why some of it had to be formed."""
    found = value.terms if isinstance(value, Unformed) else (whole(value, flag, why),)
    parts: list[Part] = []
    formed: list[tuple[Array, Factor, Source | None]] = []
    for term in map(fold, found):
        if len(term.factors) == 1 and term.factors[0].plain is not None:
            order = [axis for axes in term.dims for axis in axes]
            formed.append((_formed(term, shape), term.factors[0], _source(term.factors[0], order)))
            why = why or term.factors[0].reason
            continue
        part = _product(term, shape)
        if part is None:
            # The whole value is formed in the ordinary way: what remains of the terms is a product of three, say.
            array = (value.formed() if isinstance(value, Unformed) else value).astype(dtype)
            plain: Part = Formed(array, plain_layout(shape)), (flag,), (), _NOWHERE
            return [plain], "it is not a sum of products of two factors"
        parts.append(part)
    for array, factor, source in formed:
        parts.append((Formed(array, plain_layout(shape)), (factor.flags,), (), (None, source)))
    return _joined([(jax.tree.map(lambda x: _cast(x, dtype), form), *rest) for form, *rest in parts]), why


def _cast(array: Array, dtype: Any) -> Array:
    """An array of numbers in the dtype of statistics; positions stay integers."""
    return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _formed(term: Term, shape: tuple[int, ...]) -> Array:
    """A term of one factor as an array."""
    (factor,) = term.factors
    order = [axis for axes in term.dims for axis in axes]
    gone = [i for i, axis in enumerate(factor.axes) if axis not in order]
    axes = [axis for axis in factor.axes if axis in order]
    array = jnp.sum(jnp.asarray(factor.plain), gone)
    array = array.transpose([axes.index(axis) for axis in order if axis in axes])
    array = array.reshape([axis.size if axis in axes else 1 for axis in order])
    return jnp.broadcast_to(array, [axis.size for axis in order]).reshape(shape)


def _product(term: Term, shape: tuple[int, ...]) -> Part | None:
    """A term of two factors, and perhaps places, as a form; None if it is anything else."""
    places = [factor for factor in term.factors if factor.place is not None]
    rest = [factor for factor in term.factors if factor.place is None]
    if len(rest) != 2:
        return None
    order = [axis for axes in term.dims for axis in axes]
    first, second = rest
    groups = [axis for axis in order if axis in first.over and axis in second.over]
    own = [[axis for axis in order if axis in factor.over and axis not in groups] for factor in rest]
    put = [factor.hot for factor in places if factor.hot is not None]
    loose = [axis for axis in order if not any(axis in factor.over for factor in rest) and axis not in put]
    shared = [axis for axis in first.over if axis in second.over and axis not in order]
    # The left factor is the one with the leaf's first dimension, so that uses of a leaf agree on it; a lookup is always left.
    swap = second.plain is None or (first.plain is not None and _before(own[1], own[0], order))
    left, right, inputs, outputs = (second, first, own[1], own[0]) if swap else (first, second, own[0], own[1])
    if right.plain is None or any(factor.hot not in order for factor in places):
        return None
    outputs = [*outputs, *loose]
    if isinstance(left.array, Windows):
        inputs = [axis for axis in left.axes if axis in inputs]  # as the windows have them, which spares making them
    layout = Layout(
        shape,
        tuple(axis.size for axis in order),
        tuple(order.index(axis) for axis in (*put, *groups, *inputs, *outputs)),
        *(math.prod(axis.size for axis in axes) for axes in ((*put, *groups), inputs, outputs)),
    )
    held = _arranged(right, groups, shared, outputs)
    if places:
        return _placed(left, held, groups, shared, inputs, layout, places, (left.flags, right.flags))
    if left.hot is not None:
        return _lookup(left, held, groups, shared, inputs, layout, (left.flags, right.flags))
    if isinstance(left.array, Windows):
        form, flags, place, _ = _convolution(left, left.array, right, held, groups, shared, inputs, layout)
        return form, flags, place, (None, _source(right, outputs))
    form, flags, place, _ = _outer(_arranged(left, groups, shared, inputs), held, layout, (left.flags, right.flags), ())
    return form, flags, place, (_source(left, inputs), _source(right, outputs))


def _outer(left: Array, right: Array, layout: Layout, flags: tuple[int, int], place: tuple[int, ...]) -> Part:
    """An outer product; formed if one side has length one and a sum over positions makes it smaller than the other."""
    alone = layout.groups == 1 and left.shape[-2] == 1 and layout.inputs * layout.outputs > 1
    if alone or (layout.inputs > 1 and layout.outputs > 1):
        return Product(left, right, layout), flags, place, _NOWHERE
    formed = layout.leaf(jnp.matmul(left.swapaxes(-1, -2), right, precision=jax.lax.Precision.HIGHEST))
    return Formed(formed, plain_layout(layout.shape)), (flags[0] | flags[1],), (), _NOWHERE


def _placed(
    left: Factor,
    right: Array,
    groups: list[Axis],
    shared: list[Axis],
    inputs: list[Axis],
    layout: Layout,
    places: list[Factor],
    flags: tuple[int, int],
) -> Part | None:
    """A product that is one part of a leaf, such as one layer's weight in a stack of them: a group among empty ones."""
    if left.hot is not None:
        return None
    made = [_arranged(seen(left), groups, shared, inputs), right]
    sizes = [factor.hot.size for factor in places if factor.hot is not None]
    index, empty = 0, math.prod(sizes)
    for factor, size in zip(places, sizes, strict=True):
        index = index * size + (factor.place or 0)
    count = made[0].shape[0]
    made = [jnp.zeros((empty * count, *x.shape[1:]), x.dtype).at[index * count : (index + 1) * count].set(x) for x in made]
    return _outer(made[0], made[1], layout, flags, (index,))


def _before(a: list[Axis], b: list[Axis], order: list[Axis]) -> bool:
    return bool(a) and (not b or order.index(a[0]) < order.index(b[0]))


def _arranged(factor: Factor, *groups: list[Axis]) -> Array:
    """The factor's array with its axes in three groups, each merged; axes in none of them are summed over."""
    kept = [axis for group in groups for axis in group]
    array = jnp.sum(jnp.asarray(factor.plain), [i for i, axis in enumerate(factor.axes) if axis not in kept])
    axes = [axis for axis in factor.axes if axis in kept]
    array = array.transpose([axes.index(axis) for axis in kept if axis in axes])
    array = jnp.broadcast_to(array.reshape([a.size if a in axes else 1 for a in kept]), [a.size for a in kept])
    return array.reshape([math.prod(axis.size for axis in group) for group in groups])


def _lookup(
    left: Factor, right: Array, groups: list[Axis], shared: list[Axis], inputs: list[Axis], layout: Layout, flags: Any
) -> Part | None:
    """Rows of a table. A row looked up twice is made one, so that squares need no cross terms."""
    if groups or inputs != [left.hot] or any(axis not in shared for axis in left.axes if axis.size > 1):
        return None
    axes = [axis for axis in left.axes if axis in shared]
    indices = left.array.reshape([a.size for a in axes]) if not isinstance(left.array, Windows) else left.array.image
    indices = indices.transpose([axes.index(axis) for axis in shared]).reshape(-1)
    same = indices[:, None] == indices[None, :]
    first = ~jnp.any(jnp.tril(same, -1), axis=1)
    summed = jnp.einsum("st,gto->gso", same.astype(right.dtype), right, precision=jax.lax.Precision.HIGHEST)
    # Later occurrences move to row zero with nothing to add there; so does nothing twice that is not zero.
    merged = jnp.where(first[:, None], summed, 0)
    return Lookup(indices, merged, layout), (flags[0], flags[0] | flags[1]), (), _NOWHERE


def _convolution(
    left: Factor,
    windows: Windows,
    right: Factor,
    held: Array,
    groups: list[Axis],
    shared: list[Axis],
    inputs: list[Axis],
    layout: Layout,
) -> Part:
    """An image seen through windows, as long as the axes are where windows give them; else the windows themselves."""
    wanted = [axis for axis in (*groups, *shared, *inputs) if axis.size > 1]
    if wanted == [axis for axis in left.axes if axis.size > 1]:
        return Convolution(windows, held, layout), (left.flags, right.flags), (), _NOWHERE
    return _outer(_arranged(seen(left), groups, shared, inputs), held, layout, (left.flags, right.flags), ())


def _joined(parts: list[Part]) -> list[Part]:
    """Parts of one leaf put together where they can be: uses with one layout are positions, formed gradients add up."""
    made: list[Part] = []
    for part in parts:
        for i, other in enumerate(made):
            together = _together(other, part)
            if together is not None:
                made[i] = together
                break
        else:
            made.append(part)
    return made


def _together(a: Part, b: Part) -> Part | None:
    (one, flags, places, _), (two, others, more, _) = a, b
    if flags != others:
        return None
    if isinstance(one, Formed) and isinstance(two, Formed):
        return Formed(one.value + two.value, one.layout), flags, (), _NOWHERE
    if not (isinstance(one, Product) and isinstance(two, Product)) or one.layout != two.layout:
        return None
    apart = places and more and not set(places) & set(more) and one.right.shape == two.right.shape
    join = jnp.add if apart else lambda x, y: jnp.concatenate([x, y], axis=1)
    return Product(join(one.left, two.left), join(one.right, two.right), one.layout), flags, (*places, *more), _NOWHERE
