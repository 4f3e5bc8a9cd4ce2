"""Leaves made of random numbers without a model, and the quantities expected of them, from dense gradients in NumPy."""

import dataclasses
import functools
import itertools
import math

import jax.numpy as jnp
import numpy as np

from jaxfisher._engine.forms import Convolution, Formed, Layout, Leaf, Lookup, Product
from jaxfisher._engine.windows import Windows
from jaxfisher._scores import HeldScores
from jaxfisher._tree import param_spec

N, ROWS = 4, 3
OWN, OF_EXAMPLE, OF_ROW, SHARED = (N, ROWS), (N, 1), (1, ROWS), (1, 1)
"""The row axes of an array, examples and rows of an example; an axis has length one if the array does not depend on it."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A form, its gradients ``[examples, rows, *shape]`` from loops over its factors, and the same sums of absolute values."""

    form: object
    rows: np.ndarray
    sizes: np.ndarray


def layout_of(rng, groups, inputs, outputs):
    """A layout of a leaf whose groups, inputs and outputs are in a random order, each of one axis or two."""
    sides = [[size] if rng.random() < 0.5 else _two(size) for size in (groups, inputs, outputs)]
    fine = [(side, k) for side, sizes in enumerate(sides) for k in range(len(sizes))]
    # The axes of one side keep their order, and those of different sides are interleaved.
    mixed = [fine[i] for i in rng.permutation(len(fine))]
    axes = tuple(sides[side][k] for side, k in mixed)
    order = tuple(mixed.index(name) for name in fine)
    return Layout(axes, axes, order, groups, inputs, outputs)


def _two(size):
    small = next((k for k in range(2, size) if size % k == 0), 1)
    return [small, size // small]


def in_leaf_order(layout, matrices):
    """Matrices ``[..., groups, inputs, outputs]`` as leaves, entry by entry."""
    lead = matrices.shape[:-3]
    fine = matrices.reshape(*lead, *(layout.axes[i] for i in layout.order))
    leaf = np.zeros((*lead, *layout.axes))
    for place in itertools.product(*(range(size) for size in layout.axes)):
        leaf[(..., *place)] = fine[(..., *(place[i] for i in layout.order))]
    return leaf.reshape(*lead, *layout.shape)


def numbers(rng, *shape, dtype, size=1.0):
    """Normal numbers times sizes."""
    return (rng.standard_normal(shape) * size).astype(dtype)


ORDINARY = 1.0, 1.0
"""The sizes of left and of right factors."""


def extreme(rng, left, right, positions, biased=False):
    """Sizes of left and right factors ``[n, rows, 1, T, 1]`` from 1e-30 to 1e30, of products from 1e-8 to 1e8, and zeros.

    The larger a left factor is, the smaller are the right factors that it meets, but those of a layer with a bias are ordinary.
    """
    both = [a if a == b else 1 for a, b in zip(left, right, strict=True)]
    shapes = [(*rows, 1, positions, 1) for rows in (both, left, right)]
    powers = rng.integers(-26, 0 if biased else 27, shapes[0])
    own = [10.0 ** rng.integers(-4, 5, shape) for shape in shapes[1:]]
    sizes = [own[0] * 10.0**powers, own[1] if biased else own[1] * 10.0**-powers]
    # A dead or saturated unit has a derivative of zero, however large its input. The reverse also occurs.
    fate = rng.random(shapes[0])
    dead = fate > 0.8, fate < 0 if biased else fate < 0.2
    huge = [np.where(other, 1e30, size) for size, other in zip(sizes, dead, strict=True)]
    return tuple(np.where(zero, 0, size) for size, zero in zip(huge, dead[::-1], strict=True))


def wide(array):
    return np.asarray(array, np.float64)


def summed(left, right):
    """``sum_t left_t (x) right_t`` by a loop over positions, ``[examples, rows, groups, inputs, outputs]``."""
    total = 0
    for t in range(left.shape[3]):
        total = total + left[:, :, :, t, :, None] * right[:, :, :, t, None, :]
    return np.broadcast_to(total, (N, ROWS, *total.shape[2:]))


def of_factors(form, left, right, layout):
    """A form made of these factors, with its gradients."""
    left, right = wide(left), wide(right)
    rows, sizes = summed(left, right), summed(np.abs(left), np.abs(right))
    return Made(form, in_leaf_order(layout, rows), in_leaf_order(layout, sizes))


def product(rng, dtype, layout, positions=1, left=OF_EXAMPLE, right=OWN, sizes=ORDINARY):
    lefts = numbers(rng, *left, layout.groups, positions, layout.inputs, dtype=dtype, size=sizes[0])
    rights = numbers(rng, *right, layout.groups, positions, layout.outputs, dtype=dtype, size=sizes[1])
    form = Product(jnp.asarray(lefts), jnp.asarray(rights), layout)
    return of_factors(form, lefts, rights, layout)


def lookup(rng, dtype, layout, positions=1, left=OF_EXAMPLE, right=OWN):
    """Rows of a table; no row of scores has a row of the table twice."""
    size = layout.inputs
    indices = np.stack([rng.permutation(size)[:positions] for _ in range(math.prod(left))]).reshape(*left, positions)
    rights = numbers(rng, *right, 1, positions, layout.outputs, dtype=dtype)
    form = Lookup(jnp.asarray(indices.astype(np.int32)), jnp.asarray(rights), layout)
    return of_factors(form, np.eye(size)[indices][:, :, None], rights, layout)


def formed(rng, dtype, shape, rows=OWN):
    value = numbers(rng, *rows, *shape, dtype=dtype)
    rows = np.broadcast_to(wide(value), (N, ROWS, *shape))
    return Made(Formed(jnp.asarray(value)), rows, np.abs(rows))


def convolution(rng, dtype, outputs, left=OF_EXAMPLE, right=OWN, groups=(1, 1), sizes=ORDINARY):
    """A kernel of 2 by 3 with a stride and a dilation; images of two or four channels, in groups of rows or of depth."""
    row_groups, depth_groups = groups
    kernel, places, strides, dilations = (2, 3), (3, 2), (2, 1), (1, 2)
    reach = [(k - 1) * s + (p - 1) * d + 1 for k, p, s, d in zip(kernel, places, strides, dilations, strict=True)]
    image = numbers(rng, *left, 2 * row_groups, depth_groups, *reach, dtype=dtype, size=np.expand_dims(sizes[0], -1))
    windows = Windows(jnp.asarray(image), kernel, places, strides, dilations, row_groups, depth_groups)
    count, positions, inputs = row_groups * depth_groups, math.prod(places), 2 * math.prod(kernel)
    lefts = np.zeros((*left, count, positions, inputs))
    for b, (t, place), (i, (channel, *offset)) in itertools.product(
        range(count), enumerate(np.ndindex(*places)), enumerate(np.ndindex(2, *kernel))
    ):
        at = [o * s + p * d for o, p, s, d in zip(offset, place, strides, dilations, strict=True)]
        row, depth = divmod(b, depth_groups)
        lefts[:, :, b, t, i] = image[:, :, 2 * row + channel, depth, at[0], at[1]]
    rights = numbers(rng, *right, count, positions, outputs, dtype=dtype, size=sizes[1])
    layout = Layout((count, inputs, outputs), (count, inputs, outputs), (0, 1, 2), count, inputs, outputs)
    return of_factors(Convolution(windows, jnp.asarray(rights), layout), lefts, rights, layout)


@dataclasses.dataclass(frozen=True)
class Case:
    """Leaves, their gradients side by side as rows, and the same sums of absolute values."""

    leaves: tuple[Leaf, ...]
    rows: np.ndarray
    sizes: np.ndarray


def flat(rows):
    return rows.reshape(N * ROWS, -1)


def leaf(dtype, *parts):
    """A leaf that is the sum of some forms."""
    shape = parts[0].rows.shape[2:]
    made = Leaf(tuple(part.form for part in parts), shape, jnp.dtype(dtype), N, ROWS)
    return Case((made,), flat(sum(part.rows for part in parts)), flat(sum(part.sizes for part in parts)))


def layer(dtype, *parts):
    """A weight and its bias: the right factors summed over positions, and over the forms of the weight."""
    weight = leaf(dtype, *parts)
    value = sum(np.sum(np.asarray(part.form.right), 3) for part in parts)
    value = jnp.asarray(value if value.shape[2] > 1 else value[:, :, 0])
    bias = Leaf((Formed(value),), value.shape[2:], jnp.dtype(dtype), N, ROWS, layer=0)
    rights = [np.broadcast_to(wide(part.form.right), (N, ROWS, *part.form.right.shape[2:])) for part in parts]
    return Case(
        (dataclasses.replace(weight.leaves[0], bias=True), bias),
        np.hstack([weight.rows, sum(flat(right.sum(3)) for right in rights)]),
        np.hstack([weight.sizes, sum(flat(np.abs(right).sum(3)) for right in rights)]),
    )


def beside(*cases):
    """The leaves of several cases."""
    return Case(
        tuple(made for case in cases for made in case.leaves),
        np.hstack([case.rows for case in cases]),
        np.hstack([case.sizes for case in cases]),
    )


def scores_of(leaves, weights):
    """Scores in memory with these leaves."""
    spec = param_spec([jnp.zeros(made.shape, made.dtype) for made in leaves])
    return HeldScores(tuple(leaves), weights, spec)


KINDS = (OWN, OF_EXAMPLE, OF_ROW, SHARED)
USUAL = ((OWN, OF_ROW), (OF_EXAMPLE, OWN), (OF_EXAMPLE, OF_ROW))
"""The usual row axes of left and right factors: they depend on the example, on its row, or on both."""


@functools.cache
def cases(dtype, seed=0):
    """Leaves of every form: all kinds of row axes, one position and more, single forms, sums of forms, and with a bias."""
    rng = np.random.default_rng(seed)
    wide_layout = layout_of(rng, 1, 6, 4)
    tall, many, column, row = (layout_of(rng, *sizes) for sizes in ((1, 40, 30), (3, 4, 2), (1, 6, 1), (1, 1, 4)))
    found = {}
    for k, (left, right) in enumerate(itertools.product(KINDS, repeat=2)):
        layout, positions = (wide_layout, 1) if k % 2 else (tall, 3)
        found[f"product {left} x {right}"] = leaf(dtype, product(rng, dtype, layout, positions, left, right))
    for left, right in USUAL:
        name = f"{left} x {right}"
        found[f"layer {name}"] = layer(dtype, product(rng, dtype, wide_layout, 1, left, right))
        found[f"layer of positions {name}"] = layer(dtype, product(rng, dtype, tall, 2, left, right))
        found[f"layer of a convolution {name}"] = layer(dtype, convolution(rng, dtype, 5, left, right))
        found[f"layer of groups {name}"] = layer(dtype, product(rng, dtype, many, 1, left, right))
        found[f"lookup {name}"] = leaf(dtype, lookup(rng, dtype, wide_layout, 3, left, right))
        found[f"convolution {name}"] = leaf(dtype, convolution(rng, dtype, 2, left, right))
        found[f"gradients formed of positions {name}"] = leaf(dtype, product(rng, dtype, wide_layout, 5, left, right))
        found[f"groups {name}"] = leaf(dtype, product(rng, dtype, many, 2, left, right))
    for rows in KINDS:
        found[f"formed {rows}"] = leaf(dtype, formed(rng, dtype, (3, 2), rows))
    for name, groups in {"rows": (2, 1), "depth": (1, 2)}.items():
        found[f"convolution in groups of {name}"] = leaf(dtype, convolution(rng, dtype, 2, groups=groups))
    for name, one in {"column": column, "row": row}.items():
        found[f"a {name} of positions"] = leaf(dtype, product(rng, dtype, one, 3))
        found[f"a layer of one {name}"] = layer(dtype, product(rng, dtype, one))
    return {**found, **_sums(rng, dtype, tall, wide_layout)}


def _sums(rng, dtype, tall, wide_layout):
    turned = wide_layout.turned()
    kernel = convolution(rng, dtype, 2)
    return {
        "two products": leaf(dtype, product(rng, dtype, tall), product(rng, dtype, tall, 2, OWN, OF_EXAMPLE)),
        "a layer of two products": layer(dtype, product(rng, dtype, tall), product(rng, dtype, tall, 2, OWN, OF_EXAMPLE)),
        "a table and a product": leaf(dtype, lookup(rng, dtype, tall, 2), product(rng, dtype, tall)),
        "a product and a table": leaf(dtype, product(rng, dtype, tall), lookup(rng, dtype, tall, 2, OWN, OWN)),
        "a table and many positions": leaf(dtype, lookup(rng, dtype, tall, 3), product(rng, dtype, tall, 5)),
        "two tables": leaf(dtype, lookup(rng, dtype, tall, 2), lookup(rng, dtype, tall, 3, OWN, OF_ROW)),
        "two layouts": leaf(dtype, product(rng, dtype, wide_layout), product(rng, dtype, turned, 2)),
        "a product and a constant": leaf(
            dtype, product(rng, dtype, wide_layout), formed(rng, dtype, wide_layout.shape, SHARED)
        ),
        "a table and what is formed": leaf(
            dtype, lookup(rng, dtype, wide_layout, 3), formed(rng, dtype, wide_layout.shape, OWN)
        ),
        "two convolutions": leaf(dtype, kernel, convolution(rng, dtype, 2, OWN, OWN)),
        "a convolution and what is formed": leaf(dtype, kernel, formed(rng, dtype, kernel.rows.shape[2:], OF_EXAMPLE)),
        "nothing": Case((Leaf((), (2, 3), jnp.dtype(dtype), N, ROWS),), *np.zeros((2, N * ROWS, 6))),
    }
