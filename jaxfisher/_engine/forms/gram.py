"""Inner products of the gradients of all pairs of rows, over all leaves: the Gram matrix ``S S^T``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._engine.forms.arrays import few, inner, room, total
from jaxfisher._engine.forms.cost import by_factors, factors, forms_gradients
from jaxfisher._engine.forms.form import Factored
from jaxfisher._engine.forms.leaf import Leaf
from jaxfisher._engine.forms.lookup import Lookup
from jaxfisher._engine.forms.product import Product
from jaxfisher._engine.forms.tiles import by_columns
from jaxfisher._examples import map_batches
from jaxfisher._linalg import matmul, to_unit


class Scale(NamedTuple):
    """Numbers that left and right factors are multiplied by; their product is what gradients are multiplied by."""

    left: Scalar
    right: Scalar


class Pair(NamedTuple):
    """One leaf of two blocks of rows. With a ``bias``, that of its layer comes along: it is left out for itself."""

    mine: Leaf
    theirs: Leaf
    bias: bool

    @property
    def agrees(self) -> bool:
        """Whether inner products come from those of both's factors."""
        return _agree(self.mine, self.theirs)


def _agree(mine: Leaf, theirs: Leaf) -> bool:
    return all(by_factors(leaf) and bool(leaf.forms) for leaf in (mine, theirs)) and mine.layout == theirs.layout


def gram_upper(leaves: Sequence[Leaf], factor: Scalar) -> Float[Array, "rows rows"]:
    """``(factor S) (factor S)^T``; only the upper triangle is worth reading."""
    pairs = _paired(leaves, leaves)
    cut = [pair for pair in pairs if not forms_gradients(pair.mine)]
    whole = [_own_gram(pair.mine, factor) for pair in pairs if forms_gradients(pair.mine)]
    return total([*([_strips(cut, factor)] if cut else []), *whole])


def cross_gram(mine: Sequence[Leaf], theirs: Sequence[Leaf], factor: Scalar) -> Float[Array, "rows others"]:
    """``(factor S) (factor S')^T`` against the rows of another block."""
    return _flat(total([_gram(pair, _scale(pair.mine, factor)) for pair in _paired(mine, theirs)]))


def _paired(mine: Sequence[Leaf], theirs: Sequence[Leaf]) -> list[Pair]:
    """The leaves of two blocks of rows, side by side, without the biases that come along with their weights."""
    joined = {
        a.layer
        for a, b in zip(mine, theirs, strict=True)
        if a.layer is not None and a.layer == b.layer and _agree(mine[a.layer], theirs[a.layer])
    }
    leaves = enumerate(zip(mine, theirs, strict=True))
    return [Pair(a, b, k in joined) for k, (a, b) in leaves if a.layer is None or a.layer not in joined]


def _flat(blocks: Float[Array, "n rows m rows2"]) -> Float[Array, "n*rows m*rows2"]:
    return blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)


def _strips(pairs: Sequence[Pair], factor: Scalar) -> Float[Array, "rows rows"]:
    """Inner products of the rows of some leaves, strip by strip of the upper triangle."""
    examples, rows = pairs[0].mine.examples, pairs[0].mine.rows
    size = max(-(-examples // 4), -(-256 // rows))
    scales = [_scale(pair.mine, factor) for pair in pairs]
    strips = []
    for start in range(0, examples, size):
        some, rest = slice(start, start + size), slice(start, examples)
        cut = [Pair(mine.take(some), theirs.take(rest), bias) for mine, theirs, bias in pairs]
        strip = total([_gram(pair, scale) for pair, scale in zip(cut, scales, strict=True)])
        strips.append(jnp.pad(_flat(strip), ((0, 0), (start * rows, 0))))
    return jnp.concatenate(strips)


def _own_gram(leaf: Leaf, factor: Scalar) -> Float[Array, "rows rows"]:
    """Inner products of all pairs of gradients, each gradient being formed once."""
    blocks = jnp.sum(by_columns(lambda d: _inner_formed(d, d, factor), leaf), 0)
    return _flat(jnp.broadcast_to(blocks, (leaf.examples, leaf.rows, leaf.examples, leaf.rows)))


def _scale(leaf: Leaf, factor: Scalar) -> Scale:
    """How to multiply gradients by ``factor`` so that left factors are at most one."""
    dense = [form.left for form in leaf.forms if isinstance(form, Product)]
    if not dense or not by_factors(leaf) or len(dense) < len(leaf.forms):
        return Scale(jnp.ones((), leaf.dtype), factor)
    unit = to_unit(*(jnp.max(jnp.abs(left), initial=0.0) for left in dense))
    return Scale(unit, factor / unit)


def _gram(pair: Pair, scale: Scale) -> Float[Array, "n rows m rows2"]:
    """The inner products of one leaf, the gradients being multiplied by ``scale``."""
    mine, theirs, _ = pair
    shape = (mine.examples, mine.rows, theirs.examples, theirs.rows)
    if not mine.forms or not theirs.forms:
        return jnp.zeros(shape, mine.dtype)
    if pair.agrees:
        return jnp.broadcast_to(_by_factors(pair, scale), shape)
    if mine.layout != theirs.layout:
        mine, theirs = mine.formed(), theirs.formed()
    products = partial(_inner_formed, factor=scale.left * scale.right)
    return jnp.broadcast_to(jnp.sum(by_columns(products, mine, theirs), 0), shape)


def _inner_formed(mine: Array, theirs: Array, factor: Scalar) -> Float[Array, "n r m q"]:
    flat = [x.reshape(x.shape[0] * x.shape[1], -1) for x in (mine, theirs)]
    return (matmul(flat[0] * factor, flat[1].T) * factor).reshape(*mine.shape[:2], *theirs.shape[:2])


def _by_factors(pair: Pair, scale: Scale) -> Float[Array, "n rows m rows2"]:
    """From the factors; for some examples at a time where the positions of all would take too much memory."""
    mine = pair.mine
    counts = [max(math.prod(x.right.shape[k] for k in (0, 1, 3)) for x in factors(leaf) or ()) for leaf in pair[:2]]
    size = counts[0] * counts[1] * mine.layout.groups
    if size <= room() or mine.examples == 1 or mine.positions == 1:
        return _all_pairs(pair, scale)
    full = jax.tree.map(lambda x: jnp.broadcast_to(x, (mine.examples, *x.shape[1:])), mine)
    flat, treedef = jax.tree.flatten(full.forms)

    def some(*flat: Array) -> Array:
        part = Leaf(jax.tree.unflatten(treedef, flat), mine.shape, mine.dtype, flat[0].shape[0], mine.rows)
        return _all_pairs(pair._replace(mine=part), scale)

    return map_batches(some, tuple(flat), few(size / mine.examples))


def _all_pairs(pair: Pair, scale: Scale) -> Float[Array, "n rows m rows2"]:
    forms = itertools.product(factors(pair.mine) or (), factors(pair.theirs) or ())
    return total([_inner_factored(one, two, scale, bias=pair.bias) for one, two in forms])


def _inner_factored(one: Factored, two: Factored, scale: Scale, *, bias: bool) -> Float[Array, "n r m q"]:
    """Inner products of two forms; with a ``bias``, of a layer whose last input is one."""
    # One side of each product is scaled before and its result after: what is squared stays near one, and nothing large is
    # copied.
    right = inner(one.right * scale.right, two.right) * scale.right
    left = _inner_left(one, two, scale.left)
    return jnp.sum((left + jnp.square(scale.left) if bias else left) * right, (0, 3, 6))


def _inner_left(one: Factored, two: Factored, scale: Scalar) -> Float[Array, "b n r t m q s"]:
    """Inner products of left factors times ``scale``; rows of a table are not scaled, but ones and zeros as they are."""
    match one, two:
        case Lookup(), Lookup():
            return one.same(two).astype(scale.dtype)
        case Lookup(), Product():
            return jnp.moveaxis(one.picked(two.left * scale), (1, 2, 3), (4, 5, 6)) * scale
        case Product(), Lookup():
            return two.picked(one.left * scale) * scale
        case Product(), Product():
            return inner(one.left * scale, two.left) * scale
    raise TypeError(f"no inner products of {type(one).__name__} and {type(two).__name__}")
