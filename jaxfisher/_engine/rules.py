"""The rules: what each primitive that a weight's gradient passes through does to products that are not formed.

The table `RULES` at the end is all that the engine knows of primitives, loops apart, which are in `loops`. The result of a
primitive without a rule is formed in the ordinary way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxfisher._engine.axes import Axis, Origin, cut, dim
from jaxfisher._engine.program import Equation
from jaxfisher._engine.rule import EXAMPLE, Operand, Rule, Terms, all_operands, each, every, nothing, one_result
from jaxfisher._engine.terms import (
    Factor,
    Term,
    Unformed,
    along,
    broadcast,
    contract,
    entrywise,
    laid_out,
    multiply,
    place,
    real,
    reduce_sum,
    reshape,
    scale,
    transpose,
    whole,
    wider,
)
from jaxfisher._engine.windows import Windows

# Sums and casts.


def _cast(equation: Equation, operands: Sequence[Operand]) -> Sequence[Terms] | None:
    # Casts are postponed: each factor is cast once, when it is stored. A cast to a real dtype takes the real part here.
    wide = np.issubdtype(equation.result_dtypes[0], np.complexfloating)
    return (operands[0].terms(),) if wide and operands[0].unformed is not None else _real(equation, operands)


def arranges(equation: Equation) -> bool:
    """Whether the equation only rearranges, casts or adds up the entries of its operands, and repeats none.

    It may put them at one position of a stack, with zeros at the others.
    """
    rule = RULES.get(equation.primitive.name)
    if rule is None or not rule.arranges:
        return False
    if equation.primitive.name != "pad":
        return math.prod(equation.shape) <= math.prod(equation.shapes[0])
    changed = [i for i, entry in enumerate(equation.params["padding_config"]) if entry != (0, 0, 0)]
    return len(changed) == 1 and equation.shapes[0][changed[0]] == 1


def rearranged(equation: Equation, operand: Operand) -> Term | None:
    """The result as a term of one factor, if the equation only rearranges the entries of its operand, or casts real numbers."""
    real = all(jnp.issubdtype(dtype, jnp.floating) for dtype in (*equation.dtypes, *equation.result_dtypes))
    if not arranges(equation) or not real or equation.primitive.name in ("reduce_sum", "add_any", "pad", "split"):
        return None
    term = operand.one_factor
    if term is None:
        return None
    made = RULES[equation.primitive.name](equation, [Operand(Unformed((term,), operand.array), operand.flags)])
    return None if made is None else made[0][0]


def _before_casts(equation: Equation, operands: Sequence[Operand]) -> list[Array]:
    """The operands' arrays, in their common dtype where one of them is taken as it was before a cast.

    A bias in float32 would lose digits if it took its gradient from the cotangent that its weight in bfloat16 has.
    """
    arrays = []
    for operand, dtype in zip(operands, equation.dtypes, strict=True):
        term = operand.arranged
        cast = term is not None and jnp.asarray(term.factors[0].plain).dtype != dtype
        arrays.append(laid_out(term) if term is not None and cast else operand.array())
    if [array.dtype for array in arrays] == equation.dtypes:
        return arrays
    dtype = wider(*(array.dtype for array in arrays))
    return [array if array.dtype == dtype else array.astype(dtype) for array in arrays]


def _real(equation: Equation, operands: Sequence[Operand]) -> Sequence[Terms] | None:
    value = operands[0].unformed
    return None if value is None else _real_parts(value.terms)


def _imag(equation: Equation, operands: Sequence[Operand]) -> Sequence[Terms] | None:
    value = operands[0].unformed
    turned = None if value is None else every(scale(term, -1j) for term in value.terms)
    return None if turned is None else _real_parts(turned)


def _real_parts(found: Terms) -> Sequence[Terms] | None:
    parts = [real(term) for term in found]
    return None if any(part is None for part in parts) else (tuple(term for part in parts for term in part or ()),)


def _add(equation: Equation, operands: Sequence[Operand]) -> Sequence[Terms] | None:
    values = [operand.unformed for operand in operands]
    product = any(value is not None and value.is_product for value in values)
    if any(operand.flags and (product or operand.unformed is None) and operand.is_whole for operand in operands):
        return None  # the program has a gradient of this size anyway
    if None in values and not product and all(value is None or value.terms for value in values):
        return None
    return ((*operands[0].terms(), *operands[1].terms()),)


def _same_shapes(equation: Equation) -> bool:
    return equation.shapes[0] == equation.shapes[1] == equation.shape


# Products. Either one operand is a number, or both have the same rank and a dimension of length one broadcasts.


def _same_ranks(equation: Equation) -> bool:
    return all(len(shape) == len(equation.shape) for shape in equation.shapes)


def _multiply(equation: Equation, operands: Sequence[Operand]) -> Sequence[Terms] | None:
    for value, number, shape in zip(operands, operands[::-1], equation.shapes[::-1], strict=True):
        if value.unformed is not None and not shape:
            return one_result(every(scale(term, number.array(), number.flags) for term in value.terms()))
    if all(operand.unformed is None for operand in operands) or not _same_ranks(equation):
        return None
    return one_result(_smaller(multiply(a, b) for a in operands[0].terms() for b in operands[1].terms()))


def _smaller(made: Any) -> Terms | None:
    """The terms, if none of them is None and each holds fewer numbers than the value or is a product."""
    found = every(made)
    return found if found is not None and all(term.is_smaller for term in found) else None


def _divide(equation: Equation, operands: Sequence[Operand]) -> Sequence[Terms] | None:
    value, by = operands
    if value.unformed is None:
        return None
    if not equation.shapes[1]:
        return one_result(every(scale(term, 1 / by.array(), by.flags) for term in value.terms()))
    if not _same_ranks(equation):
        return None
    # Inversion is not linear: a divisor that is a sum of terms has to be formed before it is inverted.
    parts = by.terms()
    inverse = entrywise(parts[0], lambda x: 1 / x) if len(parts) == 1 else None
    if inverse is None:
        inverse = whole(1 / by.array(), by.flags, by.reason)
    return one_result(every(multiply(term, inverse) for term in value.terms()))


def _varying(equation: Equation, flags: Sequence[int]) -> Sequence[int]:
    # If one operand is the same for every example, as a second weight is, the product keeps the other's outer product.
    varying = [k for k, flag in enumerate(flags) if flag & EXAMPLE]
    return varying if len(varying) == 1 else ()


def _dot(equation: Equation, operands: Sequence[Operand]) -> Sequence[Terms] | None:
    (contracted, batch), (left, right) = equation.params["dimension_numbers"], operands
    for unformed, matrix, side in ((left, right, 0), (right, left, 1)):
        if unformed.unformed is not None and unformed.unformed.is_product and not matrix.flags:
            return one_result(_dot_after(unformed.terms(), matrix, contracted, batch, side))
    sizes = [math.prod(shape) for shape in (*equation.shapes, equation.shape)]
    if not (left.flags and right.flags) and (contracted[0] or sizes[2] <= max(sizes[:2])):
        return None  # an ordinary linear map: there is nothing to leave unformed
    arrays = _before_casts(equation, operands)
    axes = [[Axis(size) for size in array.shape] for array in arrays]
    for i, j in zip((*contracted[0], *batch[0]), (*contracted[1], *batch[1]), strict=True):
        axes[1][j] = axes[0][i]
    factors = tuple(
        Factor(array, tuple(names), operand.flags, reason=operand.reason, origin=_origin(operand, array, names))
        for array, names, operand in zip(arrays, axes, operands, strict=True)
    )
    free = [
        [names[i] for i in range(len(names)) if i not in contracted[side] and i not in batch[side]]
        for side, names in enumerate(axes)
    ]
    dims = ([axes[0][i] for i in batch[0]], *free)
    return ((Term(factors, tuple(dim(axis) for group in dims for axis in group)),),)


def _origin(operand: Operand, array: Array, names: Sequence[Axis]) -> Origin | None:
    """The value of the program whose entries an array holds rearranged; None if there is no such value."""
    term = operand.one_factor
    if term is None:
        return None
    known = term.factors[0].source
    if any(axis not in known.steps for axes in term.dims for axis in axes):
        return None  # the value is repeated along an axis
    own = zip(names, term.dims, strict=True)
    steps = {name: tuple(step for axis in axes for step in known.steps[axis]) for name, axes in own}
    return known._replace(array=array, steps=steps)


def _dot_after(found: Terms, matrix: Operand, contracted: Any, batch: Any, side: int) -> Terms | None:
    """An unformed product times a matrix that is the same for every example, or one matrix for each group of a stack."""
    array = matrix.array()
    (dims, over), groups = (contracted, batch) if side == 0 else (contracted[::-1], batch[::-1])
    made = [contract(term, dims, array, over, matrix.flags, groups) for term in found]
    if side == 1:
        # The matrix is the first operand, so its dimensions come first, behind those of the batch.
        count, rest = len(batch[0]), array.ndim - len(contracted[0]) - len(batch[0])
        turned = lambda size: (*range(count), *range(size - rest, size), *range(count, size - rest))  # noqa: E731
        made = [t and transpose(t, turned(len(t.dims))) for t in made]
    return every(made)


def _real_convolution(equation: Equation) -> bool:
    return not any(np.issubdtype(dtype, np.complexfloating) for dtype in equation.dtypes)


def _convolution(equation: Equation, operands: Sequence[Operand]) -> Sequence[Terms] | None:
    """A kernel's gradient: the product of the input, seen through windows as wide as the output, and the output's cotangent."""
    params = equation.params
    numbers = params["dimension_numbers"]
    left, right = _before_casts(equation, operands)
    image, filters = left.transpose(numbers.lhs_spec), right.transpose(numbers.rhs_spec)
    config = [(0, 0, 0), (0, 0, 0)]
    for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True):
        config.append((int(low), int(high), int(dilation) - 1))
    image = jax.lax.pad(image, jnp.zeros((), image.dtype), config)
    row_groups, depth_groups = params["batch_group_count"], params["feature_group_count"]
    groups, offsets = row_groups * depth_groups, filters.shape[2:]
    out = tuple(equation.shape[i] for i in numbers.out_spec)
    windows = Windows(
        image, out[2:], offsets, tuple(params["window_strides"]), tuple(params["rhs_dilation"]), row_groups, depth_groups
    )
    group, position = Axis(groups), Axis(filters.shape[1] * math.prod(offsets))
    rows, outputs = Axis(image.shape[0] // row_groups), tuple(Axis(size) for size in out[2:])
    wide = Axis(filters.shape[0] // groups)
    cotangent = filters.reshape(groups, wide.size, position.size)
    names = [Axis(size) for size in right.shape]
    origin, channels = _origin(operands[1], cotangent, names), names[numbers.rhs_spec[0]]
    if origin is not None and (halves := cut(origin.steps[channels], groups)) is not None:
        origin = origin._replace(steps=dict(zip((group, wide), halves, strict=True)))
    factors = (
        Factor(windows, (group, position, rows, *outputs), operands[0].flags),
        Factor(cotangent, (group, wide, position), operands[1].flags, origin=origin),
    )
    dims = [dim(rows), dim(group, wide), *map(dim, outputs)]
    order = np.argsort(numbers.out_spec)
    return ((Term(factors, tuple(dims[i] for i in order)),),)


# Rows of tables.


def _adds_whole_table_rows(equation: Equation) -> bool:
    """Whether the equation is the transpose of a lookup ``table[indices]`` along one axis."""
    numbers, shape, updates = equation.params["dimension_numbers"], equation.shapes[0], equation.shapes[2]
    along, window = tuple(numbers.scatter_dims_to_operand_dims), tuple(numbers.update_window_dims)
    if len(along) != 1 or tuple(numbers.inserted_window_dims) != along or numbers.operand_batching_dims:
        return False
    rows = tuple(updates[i] for i in window) == tuple(size for i, size in enumerate(shape) if i != along[0])
    # If the rows are single numbers, leaving them unformed saves nothing.
    return rows and any(updates[i] > 1 for i in window)


def _scatter_add(equation: Equation, operands: Sequence[Operand]) -> Sequence[Terms] | None:
    numbers, shape = equation.params["dimension_numbers"], equation.shapes[0]
    (along,), window = numbers.scatter_dims_to_operand_dims, tuple(numbers.update_window_dims)
    indices, updates = operands[1].array()[..., 0], operands[2].array()
    updates = updates.transpose(*(i for i in range(updates.ndim) if i not in window), *window)
    nearest = _nearest(indices, shape[along])
    if equation.params["mode"] != jax.lax.GatherScatterMode.CLIP:
        inside = nearest == indices
        updates = jnp.where(inside.reshape(*inside.shape, *(1 for _ in window)), updates, jnp.zeros((), updates.dtype))
    # Updates whose index is out of range were set to zero above, so the updates depend on whatever the indices depend on.
    added = Operand(updates, operands[1].flags | operands[2].flags, operands[2].reason)
    positions = Operand(nearest.astype(jnp.int32), operands[1].flags)
    return ((*operands[0].terms(), _table_rows(shape, along, positions, added)),)


def _nearest(indices: Array, size: int) -> Array:
    """The position in a table of this size that is nearest to each index. The size may be too large for the indices' dtype."""
    return jnp.clip(indices, 0, min(size - 1, np.iinfo(indices.dtype).max))


def _table_rows(shape: Sequence[int], along: int, indices: Operand, updates: Operand) -> Term:
    """A term for a table: positions along one of its axes, times ``updates [*indices.shape, *rest]``, which are added there."""
    positions, hot = tuple(Axis(size) for size in indices.array().shape), Axis(shape[along])
    rest = tuple(Axis(size) for i, size in enumerate(shape) if i != along)
    factors = (
        Factor(indices.array(), positions, indices.flags, hot=hot),
        Factor(updates.array(), (*positions, *rest), updates.flags, reason=updates.reason),
    )
    return Term(factors, tuple(map(dim, (*rest[:along], hot, *rest[along:]))))


def _updates_one_row(equation: Equation) -> bool:
    shape, update = equation.shapes[:2]
    partly = [i for i, size in enumerate(shape) if update[i] != size]
    return len(partly) == 1 and update[partly[0]] == 1 and math.prod(update) > 1


def _update_slice(equation: Equation, operands: Sequence[Operand]) -> Sequence[Terms] | None:
    """One row of a table of zeros: the transpose of a lookup ``table[i]``."""
    table, shape = operands[0].unformed, equation.shapes[0]
    if table is None or table.terms:
        return None
    (along,) = (i for i, size in enumerate(shape) if equation.shapes[1][i] != size)
    start = operands[2 + along]
    index = dataclasses.replace(start, value=_nearest(start.array(), shape[along]).astype(jnp.int32))
    update = dataclasses.replace(operands[1], value=jnp.squeeze(operands[1].array(), along))
    return ((_table_rows(shape, along, index, update),),)


# Arrangements.


def _broadcast(equation: Equation, operands: Sequence[Operand]) -> Sequence[Terms] | None:
    if operands[0].is_zero:
        return ((),)
    shape, dimensions = equation.params["shape"], equation.params["broadcast_dimensions"]
    return (tuple(broadcast(term, shape, dimensions) for term in operands[0].terms()),)


def _whole_order(equation: Equation) -> bool:
    return equation.params["dimensions"] is None


def _pad(equation: Equation, operands: Sequence[Operand]) -> Sequence[Terms] | None:
    value, config = operands[0], equation.params["padding_config"]
    if not operands[1].is_zero:
        return None
    if value.unformed is not None:
        return one_result(_padded(value.terms(), config))
    # An ordinary array is padded to a few rows of a table, at positions known at trace time.
    changed = [i for i, entry in enumerate(config) if entry != (0, 0, 0)]
    shape, whole = equation.shapes[0], equation.shape
    if len(changed) != 1 or 2 * math.prod(shape) > math.prod(whole) or any(config[changed[0]][k] < 0 for k in (0, 1)):
        return None
    (along,) = changed
    if shape[along] == math.prod(shape):
        return None  # the rows are single numbers: leaving them unformed saves nothing
    low, _, inside = config[along]
    indices = Operand(jnp.asarray(int(low) + (int(inside) + 1) * np.arange(shape[along]), jnp.int32), 0)
    rows = dataclasses.replace(value, value=jnp.moveaxis(value.array(), along, 0))
    return ((_table_rows(whole, along, indices, rows),),)


def _padded(found: Terms, config: Sequence[tuple[int, int, int]]) -> Terms | None:
    for i, (low, high, inside) in enumerate(config):
        if (low, high, inside) != (0, 0, 0):
            made = every(_padded_one(term, i, int(low), int(high), int(inside)) for term in found)
            if made is None:
                return None
            found = made
    return found


def _padded_one(term: Term, index: int, low: int, high: int, inside: int) -> Term | None:
    old = math.prod(axis.size for axis in term.dims[index])
    size = low + high + old + max(old - 1, 0) * inside
    if old == 1 and low >= 0 and high >= 0:
        return place(term, index, low, size)

    def change(array: Array, axis: int) -> Array:
        config = [(0, 0, 0)] * array.ndim
        config[axis] = (low, high, inside)
        return jax.lax.pad(array, jnp.zeros((), array.dtype), config)

    return along(term, index, change, size)


def _concatenate(equation: Equation, operands: Sequence[Operand]) -> Sequence[Terms] | None:
    if not any(operand.unformed is not None and operand.unformed.is_product for operand in operands):
        return None
    axis, start = equation.params["dimension"], 0
    found: list[Term] = []
    for operand, shape in zip(operands, equation.shapes, strict=True):
        config = [(0, 0, 0)] * len(shape)
        config[axis] = (start, equation.shape[axis] - start - shape[axis], 0)
        start += shape[axis]
        padded = _padded(operand.terms(), config)
        if padded is None:
            return None
        found += padded
    return (tuple(found),)


def _split(equation: Equation, operands: Sequence[Operand]) -> Sequence[Terms] | None:
    value = operands[0].unformed
    if value is None:
        return None
    axis, start = equation.params["axis"], 0
    results: list[Terms] = []
    for size in equation.params["sizes"]:
        cut = partial(_cut_out, start=start, stop=start + size)
        made = every(along(term, axis, cut, size, start) for term in value.terms)
        if made is None:
            return None
        results.append(made)
        start += size
    return results


def _cut_out(array: Array, axis: int, *, start: int, stop: int) -> Array:
    return jax.lax.slice_in_dim(array, start, stop, axis=axis)


def _reverse(term: Term, params: Mapping[str, Any]) -> Term | None:
    for i in params["dimensions"]:
        if not term.dims[i]:
            continue
        made = along(term, i, lambda array, axis: jnp.flip(array, axis), math.prod(a.size for a in term.dims[i]))
        if made is None:
            return None
        term = made
    return term


RULES: dict[str, Rule] = {
    rule.primitive: rule
    for rule in (
        Rule("dot_general", _dot, takes=_varying),
        Rule("conv_general_dilated", _convolution, takes=nothing, holds=_real_convolution),
        Rule("scatter-add", _scatter_add, holds=_adds_whole_table_rows, builds=True),
        Rule("dynamic_update_slice", _update_slice, holds=_updates_one_row, builds=True),
        Rule("broadcast_in_dim", _broadcast, arranges=True),
        Rule("add_any", _add, takes=all_operands, holds=_same_shapes, arranges=True),
        Rule("mul", _multiply, takes=all_operands, builds=True),
        Rule("div", _divide, takes=all_operands),
        Rule("neg", each(lambda term, _: scale(term, -1))),
        Rule("transpose", each(lambda term, params: transpose(term, params["permutation"])), arranges=True),
        Rule("reshape", each(lambda term, params: reshape(term, params["new_sizes"])), holds=_whole_order, arranges=True),
        Rule("reduce_sum", each(lambda term, params: reduce_sum(term, params["axes"])), arranges=True),
        Rule("convert_element_type", _cast, arranges=True),
        Rule("real", _real),
        Rule("imag", _imag),
        Rule("pad", _pad, builds=True, arranges=True),
        Rule("concatenate", _concatenate, takes=all_operands, builds=True),
        Rule("split", _split, arranges=True),
        Rule("rev", each(_reverse)),
        Rule("sharding_constraint", each(lambda term, _: term)),
    )
}
"""The rules by the names of their primitives."""
