r"""The engine: the gradient's program, cut one operation short of the gradients of the weights.

The gradient of a weight that enters a ``dot_general`` ends, in the gradient's own jaxpr, in an outer product ``a (x) g`` (a sum
of T of them where the weight is shared over T positions). `cut` runs the program up to there: it marks the values that do
nothing but become some parameter's gradient, leaves those that are products unformed, and returns their factors. Transposes,
reshapes, casts, sums of several uses and the like are done on the factors. What no rule covers is formed as usual and says so.

The rules are a table from primitives to functions; a primitive without a rule means the plain gradient, never an error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jaxtyping import Array

from jaxfisher._engine import terms
from jaxfisher._engine.program import Atom, Equation, Program
from jaxfisher._engine.terms import Axis, Factor, Term, Unformed, Windows, dim

EXAMPLE, ROW = 1, 2
"""Flags: a value depends on the example; on the row among the example's rows."""

Value = Array | Unformed


def run(program: Program, values: Sequence[Any], flags: Sequence[int]) -> list[tuple[Value, int, str | None]]:
    """Run a program, leaving its outputs unformed where rules allow; the inputs' flags are given.

    For each output: its value, its flags, and, if it is a gradient that had to be formed, why.
    """
    machine = _Machine(program, values, flags, wanted=[True] * len(program.outputs))
    return [machine.output(atom) for atom in program.outputs]


class _Machine:
    """One run of a program: what each variable holds, what it depends on, and why it was formed."""

    def __init__(self, program: Program, values: Sequence[Any], flags: Sequence[int], wanted: Sequence[bool]) -> None:
        self.flags = spread(program, flags)
        self.held: dict[int, Value] = {**program.constants, **dict(zip(program.inputs, values, strict=True))}
        self.reasons: dict[int, str] = {}
        self.wanted = self._wanted(program, wanted)
        self.last = _shown(program)
        for equation in program.equations:
            self._step(equation)

    def _wanted(self, program: Program, wanted: Sequence[bool]) -> set[int]:
        """The variables that become an output by operations with rules: those worth leaving unformed."""
        found = {atom for atom, flag in zip(program.outputs, wanted, strict=True) if flag and isinstance(atom, int)}
        for equation in reversed(program.equations):
            if not found.isdisjoint(equation.outs):
                found.update(atom for atom in self._linear_in(equation) if isinstance(atom, int))
        return found

    def _linear_in(self, equation: Equation) -> Sequence[Atom]:
        """The operands that a rule takes unformed."""
        name = equation.primitive.name
        if name == "scan":
            consts, carries = equation.loop
            return equation.ins[consts : consts + carries]
        if name == "dot_general":
            # A map that is the same for every example, such as a second weight, keeps the other operand's outer product.
            varying = [atom for atom in equation.ins if self.flag(atom) & EXAMPLE]
            return varying if len(varying) == 1 else ()
        if name in _TAKES:
            return equation.ins[_TAKES[name]]
        # No rule: left unformed all the same, so that forming it here is seen and said.
        size = math.prod(equation.shape)
        return [atom for atom, shape in zip(equation.ins, equation.shapes, strict=True) if math.prod(shape) == size]

    def flag(self, atom: Atom) -> int:
        return 0 if isinstance(atom, Literal) else self.flags[atom]

    def value(self, atom: Atom) -> Value:
        return atom.val if isinstance(atom, Literal) else self.held[atom]

    def array(self, atom: Atom) -> Array:
        value = self.value(atom)
        return value.formed() if isinstance(value, Unformed) else value

    def reason(self, atom: Atom) -> str | None:
        return None if isinstance(atom, Literal) else self.reasons.get(atom)

    def output(self, atom: Atom) -> tuple[Value, int, str | None]:
        value = self.value(atom)
        return (value if isinstance(value, Unformed) else _array(value)), self.flag(atom), self.reason(atom)

    def terms(self, atom: Atom) -> tuple[Term, ...]:
        """The value as a sum of terms; an ordinary array is a term of one factor."""
        value = self.value(atom)
        if isinstance(value, Unformed):
            return value.terms
        return (terms.whole(_array(value), self.flag(atom), self.reason(atom)),)

    def _step(self, equation: Equation) -> None:
        wanted = [out in self.wanted for out in equation.outs]
        results = self._unformed(equation, wanted) if any(wanted) else None
        if results is None:
            results = self.bind(equation)
            if any(wanted):
                self._explain(equation)
        self.held.update(zip(equation.outs, results, strict=True))

    def _unformed(self, equation: Equation, wanted: Sequence[bool]) -> list[Value] | None:
        """What the rules make of an equation; None where it has to be run."""
        name = equation.primitive.name
        if name == "scan":
            return _scan(self, equation, wanted)
        if name == "split":
            return _split(self, equation)
        made = _RULES[name](self, equation) if name in _RULES else None
        return None if made is None else [Unformed(made, lambda: self.bind(equation)[0])]

    def bind(self, equation: Equation) -> list[Any]:
        """The equation run on formed operands."""
        return equation.bind([self.array(atom) for atom in equation.ins])

    def _explain(self, equation: Equation) -> None:
        """Note why a gradient was formed here, if it is one that takes more than what the program has anyway."""
        # What a contraction was made of no longer matters, nor does it where a gradient of this size is there anyway.
        size = math.prod(equation.shape)
        free = equation.primitive.name == "dot_general" or any(
            self.flag(atom)
            and not self.reason(atom)
            and not isinstance(self.value(atom), Unformed)
            and math.prod(shape) >= size
            for atom, shape in zip(equation.ins, equation.shapes, strict=True)
        )
        reason = None if free else next((found for atom in equation.ins if (found := self.reason(atom))), None)
        if reason is None and self._costs(equation):
            reason = f"no rule takes the outer product through `{equation.primitive.name}`"
        if reason is not None:
            self.reasons.update((out, reason) for out in equation.outs)

    def _costs(self, equation: Equation) -> bool:
        """Whether forming a gradient here makes something larger than what the program has anyway."""
        if not any(self.flag(atom) for atom in equation.ins):
            return False
        name, values = equation.primitive.name, [self.value(atom) for atom in equation.ins]
        if name in _CONTROL:
            return True
        size = math.prod(equation.shape)
        varying = [
            (value, math.prod(shape))
            for value, shape, atom in zip(values, equation.shapes, equation.ins, strict=True)
            if self.flag(atom)
        ]
        arrays = [count for value, count in varying if not isinstance(value, Unformed)]
        unformed = [value for value, _ in varying if isinstance(value, Unformed)]
        if name in _BUILDS:
            held = arrays + [sum(map(_numbers, value.terms)) for value in unformed]
            return size > 2 * (sum(held) if name == "concatenate" else max(held, default=0))
        return size > max(arrays, default=0) and any(value.is_large for value in unformed)


def _numbers(term: Term) -> int:
    """How many numbers that vary a term is made of: those of its factors, or, where a sum was not taken yet, its own."""
    factors = [factor for factor in term.factors if factor.flags]
    own = {axis for axes in term.dims for axis in axes} & {axis for factor in factors for axis in factor.axes}
    return min(sum(factor.size for factor in factors), math.prod(axis.size for axis in own))


_CONTROL = frozenset({"scan", "while", "cond"})
_BUILDS = frozenset({"pad", "scatter", "scatter-add", "scatter-mul", "dynamic_update_slice", "concatenate", "mul"})
"""Operations that may build a gradient out of less than half as many numbers."""


def spread(program: Program, flags: Sequence[int]) -> dict[int, int]:
    """What every variable depends on, given what the inputs do."""
    found = {**dict.fromkeys(program.constants, 0), **dict(zip(program.inputs, flags, strict=True))}
    for equation in program.equations:
        given = [found[atom] if isinstance(atom, int) else 0 for atom in equation.ins]
        if equation.body is not None:
            found.update(zip(equation.outs, _scan_flags(equation, given)[1], strict=True))
        else:
            found.update(dict.fromkeys(equation.outs, _union(given)))
    return found


_ARRANGES = frozenset({"reshape", "squeeze", "transpose", "convert_element_type", "reduce_sum"})


def _shown(program: Program) -> set[int]:
    """The variables that are an output but for its arrangement and for sums."""
    found = {atom for atom in program.outputs if isinstance(atom, int)}
    for equation in reversed(program.equations):
        if equation.primitive.name in _ARRANGES and equation.outs[0] in found:
            found.update(atom for atom in equation.ins[:1] if isinstance(atom, int))
    return found


def _array(value: Any) -> Array:
    """The value as an array; one that is an array as the same object, by which a bias is known to have its layer's cotangent.

    On a mesh, `jnp.asarray` of JAX 0.10.0 makes another object.
    """
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def _union(flags: Sequence[int]) -> int:
    total = 0
    for flag in flags:
        total |= flag
    return total


def _scan_flags(equation: Equation, given: Sequence[int]) -> tuple[list[int], list[int]]:
    """The flags of a scan's body's inputs, once nothing changes any more around the loop, and of its outputs."""
    body, (consts, carries) = equation.body, equation.loop
    assert body is not None
    inner = list(given)
    while True:
        found = spread(body, inner)
        outs = [found[atom] if isinstance(atom, int) else 0 for atom in body.outputs]
        grown = [a | b for a, b in zip(inner[consts : consts + carries], outs[:carries], strict=True)]
        if grown == inner[consts : consts + carries]:
            return inner, outs
        inner[consts : consts + carries] = grown


Rule = Callable[[_Machine, Equation], tuple[Term, ...] | None]
"""From an equation to the terms of its first output; None where it has to be formed."""


def _each(change: Callable[[Term, Mapping[str, Any]], Term | None]) -> Rule:
    """A rule that acts on each term of the first operand, if that is unformed."""

    def rule(machine: _Machine, equation: Equation) -> tuple[Term, ...] | None:
        value = machine.value(equation.ins[0])
        return _all(change(term, equation.params) for term in value.terms) if isinstance(value, Unformed) else None

    return rule


def _reduce_sum(machine: _Machine, equation: Equation) -> tuple[Term, ...] | None:
    # Of an ordinary array only at the end: what a bias sums over positions is seen to be the cotangent of its layer.
    if not isinstance(machine.value(equation.ins[0]), Unformed) and equation.outs[0] not in machine.last:
        return None
    return _all(terms.reduce_sum(term, equation.params["axes"]) for term in machine.terms(equation.ins[0]))


def _all(made: Any) -> tuple[Term, ...] | None:
    found = tuple(made)
    return None if any(term is None for term in found) else found


def _convert(machine: _Machine, equation: Equation) -> tuple[Term, ...] | None:
    value = machine.value(equation.ins[0])
    if not isinstance(value, Unformed):
        return None
    # Casts are put off: the factors are cast, once, when they are held.
    if jnp.issubdtype(equation.params["new_dtype"], jnp.complexfloating):
        return value.terms
    return _real_parts(value)


def _real(machine: _Machine, equation: Equation) -> tuple[Term, ...] | None:
    value = machine.value(equation.ins[0])
    return _real_parts(value) if isinstance(value, Unformed) else None


def _imag(machine: _Machine, equation: Equation) -> tuple[Term, ...] | None:
    value = machine.value(equation.ins[0])
    if not isinstance(value, Unformed):
        return None
    turned = _all(terms.scale(term, jnp.asarray(-1j, jnp.complex64)) for term in value.terms)
    return None if turned is None else _real_parts(Unformed(turned, value.form))


def _real_parts(value: Unformed) -> tuple[Term, ...] | None:
    parts = [terms.real(term) for term in value.terms]
    return None if any(part is None for part in parts) else tuple(term for part in parts for term in part or ())


def _add(machine: _Machine, equation: Equation) -> tuple[Term, ...] | None:
    values = [machine.value(atom) for atom in equation.ins]
    if not any(isinstance(value, Unformed) and (value.is_product or not value.terms) for value in values):
        return None
    if any(not isinstance(machine.value(atom), Unformed) and machine.flag(atom) for atom in equation.ins):
        return None  # a gradient of this size is there anyway
    if len(set(equation.shapes)) > 1:
        return None
    return (*machine.terms(equation.ins[0]), *machine.terms(equation.ins[1]))


def _sub(machine: _Machine, equation: Equation) -> tuple[Term, ...] | None:
    if _add(machine, equation) is None:
        return None
    minus = _all(terms.scale(term, jnp.asarray(-1.0, jnp.float32)) for term in machine.terms(equation.ins[1]))
    return None if minus is None else (*machine.terms(equation.ins[0]), *minus)


def _multiply(machine: _Machine, equation: Equation) -> tuple[Term, ...] | None:
    sizes = [math.prod(shape) for shape in (*equation.shapes, equation.shape)]
    if not any(isinstance(machine.value(atom), Unformed) for atom in equation.ins) and sizes[2] <= max(sizes[:2]):
        return None
    for value, other in (equation.ins, equation.ins[::-1]):
        unformed, number = machine.value(value), machine.value(other)
        if isinstance(unformed, Unformed) and not isinstance(number, Unformed) and jnp.ndim(number) == 0:
            return _all(terms.scale(term, jnp.asarray(number), machine.flag(other)) for term in unformed.terms)
    made = _all(terms.multiply(a, b) for a in machine.terms(equation.ins[0]) for b in machine.terms(equation.ins[1]))
    return made if made is not None and all(term.is_smaller for term in made) else None


def _divide(machine: _Machine, equation: Equation) -> tuple[Term, ...] | None:
    value = machine.value(equation.ins[0])
    by = machine.terms(equation.ins[1])
    if not isinstance(value, Unformed) or len(by) != 1 or by[0].is_product:
        return None
    inverse = tuple(dataclasses.replace(f, array=1 / f.plain) for f in by[0].factors if f.plain is not None)
    if not equation.shapes[1]:
        number, flags = 1 / machine.array(equation.ins[1]), machine.flag(equation.ins[1])
        return _all(terms.scale(term, number, flags) for term in value.terms)
    return _all(terms.multiply(term, dataclasses.replace(by[0], factors=inverse)) for term in value.terms)


def _broadcast(machine: _Machine, equation: Equation) -> tuple[Term, ...] | None:
    source, params = equation.ins[0], equation.params
    if isinstance(source, Literal) and source.val == 0:
        return ()
    spread_out = tuple(terms.broadcast(t, params["shape"], params["broadcast_dimensions"]) for t in machine.terms(source))
    return spread_out


def _dot(machine: _Machine, equation: Equation) -> tuple[Term, ...] | None:
    (contracted, batch), (left, right) = equation.params["dimension_numbers"], equation.ins
    for unformed, matrix, side in ((left, right, 0), (right, left, 1)):
        value = machine.value(unformed)
        if isinstance(value, Unformed) and value.is_product and not machine.flag(matrix) and not batch[0]:
            return _dot_after(machine, value, matrix, contracted, side)
    sizes = [math.prod(shape) for shape in (*equation.shapes, equation.shape)]
    if not (machine.flag(left) and machine.flag(right)) and (contracted[0] or sizes[2] <= max(sizes[:2])):
        return None  # an ordinary linear map, nothing to leave unformed
    arrays = machine.array(left), machine.array(right)
    axes = [[Axis(size) for size in array.shape] for array in arrays]
    for i, j in zip((*contracted[0], *batch[0]), (*contracted[1], *batch[1]), strict=True):
        axes[1][j] = axes[0][i]
    factors = tuple(
        Factor(
            array, tuple(names), machine.flag(atom), reason=machine.reason(atom), origin=_origin(machine, atom, array, names)
        )
        for array, names, atom in zip(arrays, axes, (left, right), strict=True)
    )
    free = [
        [names[i] for i in range(len(names)) if i not in contracted[side] and i not in batch[side]]
        for side, names in enumerate(axes)
    ]
    dims = ([axes[0][i] for i in batch[0]], *free)
    return (Term(factors, tuple(dim(axis) for group in dims for axis in group)),)


def _origin(
    machine: _Machine, atom: Atom, array: Array, names: Sequence[Axis]
) -> tuple[Array, Array, tuple[Axis | None, ...]] | None:
    """The value that an array is an arrangement of, as `Factor.origin` has it; None if it is a value of its own."""
    value = machine.value(atom)
    if not isinstance(value, Unformed) or len(value.terms) != 1 or len(value.terms[0].factors) != 1:
        return None
    (term,) = value.terms
    if term.factors[0].plain is None:
        return None
    source, axes = term.factors[0].source
    now = {made[0]: name for made, name in zip(term.dims, names, strict=True) if len(made) == 1}
    return array, source, tuple(None if axis is None else now.get(axis) for axis in axes)


def _dot_after(machine: _Machine, value: Unformed, matrix: Atom, contracted: Any, side: int) -> tuple[Term, ...] | None:
    """An unformed product times a matrix that is the same for every example."""
    flag, array = machine.flag(matrix), machine.array(matrix)
    made = [terms.contract(term, contracted[side], array, contracted[1 - side], flag) for term in value.terms]
    if side == 1:
        # The matrix came first, and so do its dimensions.
        rest = array.ndim - len(contracted[0])
        made = [t and terms.transpose(t, (*range(len(t.dims) - rest, len(t.dims)), *range(len(t.dims) - rest))) for t in made]
    return _all(made)


def _pad(machine: _Machine, equation: Equation) -> tuple[Term, ...] | None:
    value, filler, config = machine.value(equation.ins[0]), equation.ins[1], equation.params["padding_config"]
    if not isinstance(filler, Literal) or filler.val != 0:
        return None
    if isinstance(value, Unformed):
        return _padded(value.terms, config)
    # A few rows of a table, at positions known beforehand.
    changed = [i for i, (low, high, inside) in enumerate(config) if (low, high, inside) != (0, 0, 0)]
    shape, whole = jnp.shape(value), equation.shape
    if len(changed) != 1 or 2 * math.prod(shape) > math.prod(whole) or any(config[changed[0]][k] < 0 for k in (0, 1)):
        return None
    if shape[changed[0]] == math.prod(shape):
        return None  # single numbers: nothing is saved by keeping them apart
    (along,) = changed
    low, _, inside = config[along]
    indices = int(low) + (int(inside) + 1) * jnp.arange(shape[along])
    return (_rows(machine, whole, along, indices, jnp.moveaxis(jnp.asarray(value), along, 0), (0, equation.ins[0])),)


def _padded(found: tuple[Term, ...], config: Sequence[tuple[int, int, int]]) -> tuple[Term, ...] | None:
    for i, (low, high, inside) in enumerate(config):
        if (low, high, inside) != (0, 0, 0):
            made = _all(_padded_one(term, i, int(low), int(high), int(inside)) for term in found)
            if made is None:
                return None
            found = made
    return found


def _padded_one(term: Term, index: int, low: int, high: int, inside: int) -> Term | None:
    old = math.prod(axis.size for axis in term.dims[index])
    size = low + high + old + max(old - 1, 0) * inside
    if old == 1 and low >= 0 and high >= 0:
        return terms.place(term, index, low, size)

    def change(array: Array, axis: int) -> Array:
        config = [(0, 0, 0)] * array.ndim
        config[axis] = (low, high, inside)
        return jax.lax.pad(array, jnp.zeros((), array.dtype), config)

    return terms.along(term, index, change, size)


def _concatenate(machine: _Machine, equation: Equation) -> tuple[Term, ...] | None:
    if not any(isinstance(v := machine.value(atom), Unformed) and v.is_product for atom in equation.ins):
        return None
    axis, start = equation.params["dimension"], 0
    found: list[Term] = []
    for atom, shape in zip(equation.ins, equation.shapes, strict=True):
        config = [(0, 0, 0)] * len(shape)
        config[axis] = (start, equation.shape[axis] - start - shape[axis], 0)
        start += shape[axis]
        padded = _padded(machine.terms(atom), config)
        if padded is None:
            return None
        found += padded
    return tuple(found)


def _slice(term: Term, params: Mapping[str, Any]) -> Term | None:
    strides = params["strides"] or (1,) * len(term.dims)
    for i, (start, stop, step) in enumerate(zip(params["start_indices"], params["limit_indices"], strides, strict=True)):
        old = math.prod(axis.size for axis in term.dims[i])
        if (start, stop, step) == (0, old, 1):
            continue
        cut = partial(_slice_one, start=start, stop=stop, step=step)
        made = terms.along(term, i, cut, len(range(start, stop, step)))
        if made is None:
            return None
        term = made
    return term


def _slice_one(array: Array, axis: int, *, start: int, stop: int, step: int) -> Array:
    return jax.lax.slice_in_dim(array, start, stop, step, axis)


def _reverse(term: Term, params: Mapping[str, Any]) -> Term | None:
    for i in params["dimensions"]:
        if not term.dims[i]:
            continue
        made = terms.along(term, i, lambda array, axis: jnp.flip(array, axis), math.prod(a.size for a in term.dims[i]))
        if made is None:
            return None
        term = made
    return term


def _squeeze(term: Term, params: Mapping[str, Any]) -> Term:
    return Term(term.factors, tuple(axes for i, axes in enumerate(term.dims) if i not in params["dimensions"]))


def _scatter_add(machine: _Machine, equation: Equation) -> tuple[Term, ...] | None:
    """Rows of a table: the transpose of a lookup ``table[indices]`` along one axis."""
    numbers, shape = equation.params["dimension_numbers"], equation.shapes[0]
    along = tuple(numbers.scatter_dims_to_operand_dims)
    whole_rows = len(along) == 1 and tuple(numbers.inserted_window_dims) == along and not numbers.operand_batching_dims
    if not whole_rows:
        return None
    indices, updates = machine.array(equation.ins[1])[..., 0], machine.array(equation.ins[2])
    window = tuple(numbers.update_window_dims)
    if not any(updates.shape[i] > 1 for i in window):
        return None  # single numbers: nothing is saved by keeping them apart
    if tuple(updates.shape[i] for i in window) != tuple(size for i, size in enumerate(shape) if i != along[0]):
        return None
    batch = tuple(i for i in range(updates.ndim) if i not in window)
    updates = updates.transpose(*batch, *window)
    size = shape[along[0]]
    if equation.params["mode"] == jax.lax.GatherScatterMode.CLIP:
        indices = jnp.clip(indices, 0, size - 1)
    else:
        inside = (indices >= 0) & (indices < size)
        updates = jnp.where(inside.reshape(*inside.shape, *(1 for _ in window)), updates, 0)
        indices = jnp.where(inside, indices, 0)
    table, flag = machine.terms(equation.ins[0]), machine.flag(equation.ins[1])
    return (*table, _rows(machine, shape, along[0], indices, updates, (flag, equation.ins[2])))


def _rows(
    machine: _Machine, shape: Sequence[int], along: int, indices: Array, updates: Array, source: tuple[int, Atom]
) -> Term:
    """Positions along one axis of a table times what is added there, ``updates [*indices.shape, *rest]``.

    ``source`` is what the indices depend on, and the variable that the updates come from.
    """
    positions, hot = tuple(Axis(size) for size in indices.shape), Axis(shape[along])
    rest = tuple(Axis(size) for i, size in enumerate(shape) if i != along)
    flags, atom = source
    factors = (
        Factor(indices, positions, flags, hot=hot),
        Factor(updates, (*positions, *rest), machine.flag(atom), reason=machine.reason(atom)),
    )
    return Term(factors, tuple(map(dim, (*rest[:along], hot, *rest[along:]))))


def _update_slice(machine: _Machine, equation: Equation) -> tuple[Term, ...] | None:
    """One row of a table of zeros: the transpose of a lookup ``table[i]``."""
    table, update = machine.value(equation.ins[0]), machine.array(equation.ins[1])
    shape = equation.shapes[0]
    partly = [i for i, size in enumerate(shape) if update.shape[i] != size]
    if not isinstance(table, Unformed) or table.terms or len(partly) != 1 or update.shape[partly[0]] != 1:
        return None
    if update.size == 1:
        return None  # a single number: nothing is saved by keeping it apart
    (along,) = partly
    start = equation.ins[2 + along]
    index = jnp.clip(jnp.asarray(machine.array(start)), 0, shape[along] - 1)
    source = machine.flag(start), equation.ins[1]
    return (_rows(machine, shape, along, index, jnp.squeeze(update, along), source),)


def _convolution(machine: _Machine, equation: Equation) -> tuple[Term, ...] | None:
    """A kernel's gradient is the input, seen through windows as wide as the output, times the output's cotangent."""
    params = equation.params
    numbers = params["dimension_numbers"]
    left, right = machine.array(equation.ins[0]), machine.array(equation.ins[1])
    if jnp.issubdtype(left.dtype, jnp.complexfloating):
        return None
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
    factors = (
        Factor(windows, (group, position, rows, *outputs), machine.flag(equation.ins[0])),
        Factor(
            cotangent,
            (group, wide, position),
            machine.flag(equation.ins[1]),
            origin=(cotangent, right, tuple(wide if i == numbers.rhs_spec[0] else None for i in range(right.ndim))),
        ),
    )
    dims = [dim(rows), dim(group, wide), *map(dim, outputs)]
    order = np.argsort(numbers.out_spec)
    return (Term(factors, tuple(dims[i] for i in order)),)


def _same(term: Term, params: Mapping[str, Any]) -> Term:
    return term


def _result(machine: _Machine, equation: Equation, k: int) -> Array:
    return machine.bind(equation)[k]


_RULES: dict[str, Rule] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "scatter-add": _scatter_add,
    "dynamic_update_slice": _update_slice,
    "broadcast_in_dim": _broadcast,
    "add": _add,
    "add_any": _add,
    "sub": _sub,
    "mul": _multiply,
    "div": _divide,
    "neg": _each(lambda term, _: terms.scale(term, jnp.asarray(-1.0, jnp.float32))),
    "transpose": _each(lambda term, params: terms.transpose(term, params["permutation"])),
    "reshape": _each(lambda term, params: terms.reshape(term, params["new_sizes"])),
    "squeeze": _each(_squeeze),
    "reduce_sum": _reduce_sum,
    "convert_element_type": _convert,
    "real": _real,
    "imag": _imag,
    "pad": _pad,
    "concatenate": _concatenate,
    "slice": _each(_slice),
    "rev": _each(_reverse),
    "copy": _each(_same),
    "name": _each(_same),
    "sharding_constraint": _each(_same),
}

_TAKES = {
    **dict.fromkeys(_RULES, slice(1)),
    **dict.fromkeys(("add", "add_any", "sub", "mul", "div"), slice(2)),
    "conv_general_dilated": slice(0),
    "concatenate": slice(None),
    "split": slice(1),
}
"""Which operands a rule takes unformed."""


def _split(machine: _Machine, equation: Equation) -> list[Value] | None:
    value = machine.value(equation.ins[0])
    if not isinstance(value, Unformed):
        return None
    axis, start = equation.params["axis"], 0
    results: list[Value] = []
    for k, size in enumerate(equation.params["sizes"]):
        cut = partial(_slice_one, start=start, stop=start + size, step=1)
        made = _all(terms.along(term, axis, cut, size) for term in value.terms)
        if made is None:
            return None
        results.append(Unformed(made, partial(_result, machine, equation, k)))
        start += size
    return results


def _scan(machine: _Machine, equation: Equation, wanted: Sequence[bool]) -> list[Value] | None:
    """A loop whose body forms products, run again without forming them: their factors come out stacked over the steps.

    A gradient summed over the steps in the loop's carry, ``carry + product``, leaves the carry and is summed afterwards, which
    makes the steps positions. A gradient that is one of the loop's stacked outputs has the steps as an axis of its own.
    """
    body, (consts, carries) = equation.body, equation.loop
    assert body is not None
    sums = {k for k in range(carries) if wanted[k] and _only_added_to(body, body.inputs[consts + k], body.outputs[k])}
    loop = _Loop(machine, equation, body, sums, [want and (k >= carries or k in sums) for k, want in enumerate(wanted)])
    found = loop.shapes() if any(loop.asked) else []
    machine.reasons.update((out, why) for out, (_, _, why) in zip(equation.outs, found, strict=False) if why is not None)
    unformed = [isinstance(value, Unformed) and value.is_product for value, _, _ in found]
    lazy = [asked and flag for asked, flag in zip(loop.asked, unformed, strict=False)]
    return loop.run(lazy) if any(lazy) else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Loop:
    """A scan being run: ``sums`` are the carries that are only added to, ``asked`` the results worth leaving unformed."""

    machine: _Machine
    equation: Equation
    body: Program
    sums: set[int]
    asked: list[bool]

    def _given(self) -> tuple[list[Array], list[Array], list[Array]]:
        """Constants, the first carry and what is scanned over."""
        given = [self.machine.array(atom) for atom in self.equation.ins]
        consts, carries = self.equation.loop
        return given[:consts], given[consts : consts + carries], given[consts + carries :]

    def _once(self, carry: Sequence[Array], xs: Sequence[Array]) -> list[tuple[Value, int, str | None]]:
        """One step, its products unformed. A sum starts anew: what the body adds to nothing is what it adds."""
        flags = _scan_flags(self.equation, [self.machine.flag(atom) for atom in self.equation.ins])[0]
        own = [_nothing(x) if k in self.sums else x for k, x in enumerate(carry)]
        machine = _Machine(self.body, [*self._given()[0], *own, *xs], flags, self.asked)
        return [machine.output(atom) for atom in self.body.outputs]

    def shapes(self) -> list[tuple[Value, int, str | None]]:
        """The results of a step without their numbers."""
        found: list[tuple[Value, int, str | None]] = []

        def step(carry: Any, xs: Any) -> tuple[()]:
            found[:] = self._once(carry, xs)
            return ()

        _, carry, xs = self._given()
        jax.eval_shape(step, carry, [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs])
        return found

    def run(self, lazy: Sequence[bool]) -> list[Value]:
        """All steps; results that are ``lazy`` come as factors."""
        skeletons: dict[int, tuple[Term, ...]] = {}

        def step(carry: Sequence[Array], xs: Sequence[Array]) -> tuple[list[Array], list[Any]]:
            new, stacked = list(carry), list[Any]()
            for k, (value, _, _) in enumerate(self._once(carry, xs)):
                if lazy[k] and isinstance(value, Unformed):
                    skeletons[k] = value.terms
                    stacked.append([[_arrays(factor) for factor in term.factors] for term in value.terms])
                    continue
                array = value.formed() if isinstance(value, Unformed) else value
                if k >= len(new):
                    stacked.append(array)
                else:
                    new[k] = new[k] + array if k in self.sums else array
            return new, stacked

        params = self.equation.params
        _, carry, xs = self._given()
        last, ys = jax.lax.scan(step, carry, xs, length=params["length"], reverse=params["reverse"], unroll=params["unroll"])
        stacks = iter(ys)
        results: list[Value] = []
        for k in range(len(self.equation.outs)):
            if lazy[k]:
                made = _stacked(skeletons[k], next(stacks), params["length"], summed=k in self.sums)
                start = self.machine.terms(self.equation.ins[self.equation.loop[0] + k]) if k in self.sums else ()
                results.append(Unformed((*start, *made), partial(_result, self.machine, self.equation, k)))
            else:
                results.append(last[k] if k < len(carry) else next(stacks))
        return results


def _nothing(like: Array) -> Unformed:
    """Zero, as a sum of no terms."""
    return Unformed((), lambda: jnp.zeros_like(like))


def _only_added_to(body: Program, carry: int, out: Atom) -> bool:
    """Whether all that a body does with a carry is to add to it, as often as it likes."""
    while carry != out:
        uses = [equation for equation in body.equations if carry in equation.ins]
        if len(uses) != 1 or uses[0].primitive.name not in ("add", "add_any") or uses[0].ins[0] == uses[0].ins[1]:
            return False
        if carry in body.outputs or any(isinstance(atom, Literal) for atom in uses[0].ins):
            return False
        carry = uses[0].outs[0]
    return body.outputs.count(carry) == 1


def _arrays(factor: Factor) -> Array:
    return factor.array.image if isinstance(factor.array, Windows) else factor.array


def _stacked(found: tuple[Term, ...], stacks: Any, length: int, *, summed: bool) -> tuple[Term, ...]:
    """The terms of all steps as one, the steps being an axis of every factor; of the value too, unless it is summed over."""
    made = []
    for term, arrays in zip(found, stacks, strict=True):
        steps = Axis(length)
        factors = []
        for factor, array in zip(term.factors, arrays, strict=True):
            if isinstance(factor.array, Windows):
                array = jax.vmap(lambda image, w=factor.array: dataclasses.replace(w, image=image).array())(array)
            factors.append(dataclasses.replace(factor, array=array, axes=(steps, *factor.axes)))
        made.append(Term(tuple(factors), term.dims if summed else ((steps,), *term.dims)))
    return tuple(made)
