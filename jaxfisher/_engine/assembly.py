r"""Assembly: from a row function to leaf forms. Trace it on one example, then run its program on all examples and rows.

Nothing is computed twice: values that do not depend on the row of an example (the forward pass, the input factors) are computed
once per example, and values that depend on neither once for all.
"""

from __future__ import annotations

import dataclasses
from functools import reduce
from operator import or_
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxfisher._engine.forms import Leaf
from jaxfisher._engine.layers import with_layers
from jaxfisher._engine.loops import spread
from jaxfisher._engine.machine import run
from jaxfisher._engine.parts import leaf_parts
from jaxfisher._engine.program import Program, flatten
from jaxfisher._engine.rule import EXAMPLE, ROW
from jaxfisher._engine.terms import Unformed
from jaxfisher._examples import num_examples, shape_of_one
from jaxfisher._pytree import array_fields
from jaxfisher._row_functions import Rows
from jaxfisher._tree import ParamSpec
from jaxfisher._varying import varying_like

_DEPENDENCES = (0, ROW, EXAMPLE, EXAMPLE | ROW)


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """The programs of a row and of the seeds that tell the rows of an example apart, the number of rows, the flags of seeds."""

    function: Rows
    program: Program
    seeds: Program
    rows: int
    seed_flags: int


def trace(rows: Rows, params: chex.ArrayTree, data: tuple[Any, ...]) -> Traced:
    """The program ``(params, seed, *example) -> (aux, *gradients)`` of a row function."""
    one = shape_of_one(data)
    params = varying_like(params, data)
    seeds, shapes = jax.make_jaxpr(rows.seeds, return_shape=True)(params, *one)
    if not shapes.shape[0]:
        raise ValueError(
            f"`{rows.name}` predicts no number for an example: what it returns is empty, so its Fisher has no rows. Expected "
            "at least one number; a slice may be shorter than it was meant to be."
        )
    seed = shape_of_one(shapes)
    closed, made = jax.make_jaxpr(lambda *args: rows.row(*args), return_shape=True)(params, seed, *one)
    known = rows.known(made[0])
    if known != rows:
        return trace(known, params, data)
    of_seeds = flatten(seeds)
    return Traced(rows, flatten(closed), of_seeds, shapes.shape[0], ROW | _example_flag(of_seeds, params))


def _example_flag(program: Program, params: chex.ArrayTree) -> int:
    """`EXAMPLE` if the seeds ``(params, *example) -> seeds`` depend on the example, as random targets do; else zero."""
    count = len(jax.tree.leaves(params))
    found = spread(program, [0 if i < count else EXAMPLE for i in range(len(program.inputs))])
    return reduce(or_, (found[atom] for atom in program.outputs if isinstance(atom, int)), 0)


@array_fields()
class _Skeleton:
    """The structure of the factors, without their numbers: static, so that it comes out of ``vmap`` beside them."""

    treedef: Any
    flags: tuple[int, ...]
    whys: tuple[str | None, ...]
    weights: tuple[int | None, ...]


def leaf_forms(
    traced: Traced, params: chex.ArrayTree, data: tuple[Any, ...], spec: ParamSpec
) -> tuple[tuple[Array, ...], tuple[Leaf, ...]]:
    """The row function's auxiliary output for every example, and the forms of every parameter leaf."""
    examples = num_examples(data, "data")
    params = varying_like(params, data)

    def one_row(seed: Any, *example: Any) -> Any:
        return _one_row(traced, params, seed, example, spec)

    # What is read from a `jax.Ref` has an axis for the rows, whether it differs between them or not.
    of_rows = 0 if any(equation.has_references for equation in traced.program.equations) else None

    def one_example(*example: Any) -> Any:
        # Run the flattened program, not `rows.seeds`: what only determines the number of seeds, such as a model, is dead code.
        known = jax.tree.leaves((params, example))
        (seeds,) = (output.value for output in run(traced.seeds, known, [0] * len(known), [False]))
        axes = {flag: 0 if flag & ROW else None for flag in _DEPENDENCES}
        found, skeleton, aux = jax.vmap(one_row, (0, *(None for _ in example)), (axes, None, of_rows))(seeds, *example)
        return found, skeleton, aux if of_rows is None else tuple(number[0] for number in aux)

    axes = {flag: 0 if flag & EXAMPLE else None for flag in _DEPENDENCES}
    arrays, skeleton, aux = jax.vmap(one_example, 0, (axes, None, 0), axis_size=examples)(*data)
    streams = {flag: iter(arrays[flag]) for flag in _DEPENDENCES}
    full = [_with_axes(next(streams[flag]), flag) for flag in skeleton.flags]
    forms = jax.tree.unflatten(skeleton.treedef, full)
    biased = [k in skeleton.weights for k in range(len(forms))]
    known = zip(forms, spec.shapes, skeleton.whys, skeleton.weights, biased, strict=True)
    return aux, tuple(Leaf(parts, shape, spec.dtype, examples, traced.rows, *rest) for parts, shape, *rest in known)


def _with_axes(array: Array, flag: int) -> Array:
    """The array with leading axes (examples, rows), of length one if the array does not depend on them."""
    missing = [axis for axis, bit in ((0, EXAMPLE), (1, ROW)) if not flag & bit]
    return jnp.expand_dims(array, missing)


def _one_row(traced: Traced, params: chex.ArrayTree, seed: Any, example: tuple[Any, ...], spec: ParamSpec) -> Any:
    """The factors of one row, grouped by their flags, with their skeleton and the auxiliary output."""
    dependences = ((params, 0), (seed, traced.seed_flags), (example, EXAMPLE))
    given = [(jnp.asarray(leaf), flag) for tree, flag in dependences for leaf in jax.tree.leaves(tree)]
    outputs = run(traced.program, [leaf for leaf, _ in given], [flag for _, flag in given])
    split = len(outputs) - len(spec.shapes)
    aux = tuple(output.value.formed() if isinstance(output.value, Unformed) else output.value for output in outputs[:split])
    leaves = [leaf_parts(output, shape, spec.dtype) for output, shape in zip(outputs[split:], spec.shapes, strict=True)]
    layers = with_layers([leaf.parts for leaf in leaves])
    arrays, treedef = jax.tree.flatten(tuple(tuple(part.form for part in parts) for parts in layers.leaves))
    flags = tuple(flag for parts in layers.leaves for part in parts for flag in part.flags)
    grouped: dict[int, list[Array]] = {flag: [] for flag in _DEPENDENCES}
    for array, flag in zip(arrays, flags, strict=True):
        grouped[flag].append(array)
    # The gradient of a bias is the right factor of its weight, which the program makes whatever forms it.
    whys = tuple(leaf.why if weight is None else None for leaf, weight in zip(leaves, layers.weights, strict=True))
    return grouped, _Skeleton(treedef, flags, whys, layers.weights), aux
