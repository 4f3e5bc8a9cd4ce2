"""Inner products of the gradients of all pairs of rows, over all leaves: the Gram matrix ``S S^T``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._engine.forms.arrays import divisor, few, inner, magnitude, room, taken, total
from jaxfisher._engine.forms.cost import by_factors, factors, forms_gradients
from jaxfisher._engine.forms.form import Factored
from jaxfisher._engine.forms.leaf import Leaf
from jaxfisher._engine.forms.lookup import Lookup
from jaxfisher._engine.forms.product import Deviation, Product
from jaxfisher._engine.forms.tiles import by_columns
from jaxfisher._linalg import matmul
from jaxfisher._pieces import map_batches


class Sizes(NamedTuple):
    """The largest entries of the factors of one form. The factors are divided by them during the computation."""

    left: Float[Array, "n rows groups T 1"]
    right: Float[Array, "n rows groups T 1"]


class Pair(NamedTuple):
    """One leaf of two blocks of rows. With ``bias`` the pair includes the bias of its layer, which has no pair of its own.

    ``sizes`` are those of the forms of ``mine`` if inner products are computed from factors, else None.
    """

    mine: Leaf
    theirs: Leaf
    bias: bool
    sizes: tuple[Sizes, ...] | None

    def cut(self, some: slice, rest: slice) -> Pair:
        """Some examples of each block."""
        sizes = taken(self.sizes, some, self.mine.examples)
        return Pair(self.mine.take(some), self.theirs.take(rest), self.bias, sizes)


def gram_upper(leaves: Sequence[Leaf], factor: Scalar) -> Float[Array, "rows rows"]:
    """``(factor S) (factor S)^T``; only the upper triangle is worth reading."""
    pairs = _paired(leaves, leaves)
    cut = [pair for pair in pairs if not forms_gradients(pair.mine)]
    whole = [_own_gram(pair.mine, factor) for pair in pairs if forms_gradients(pair.mine)]
    return total([*([_strips(cut, factor)] if cut else []), *whole])


def cross_gram(mine: Sequence[Leaf], theirs: Sequence[Leaf], factor: Scalar) -> Float[Array, "rows others"]:
    """``(factor S) (factor S')^T`` against the rows of another block."""
    return _flat(total([_gram(pair, factor) for pair in _paired(mine, theirs)]))


def _paired(mine: Sequence[Leaf], theirs: Sequence[Leaf]) -> list[Pair]:
    """The leaves of two blocks of rows in pairs, without the biases that the pairs of their weights include."""
    agree = [
        bool(a.forms and b.forms) and by_factors(a) and by_factors(b) and a.layout == b.layout
        for a, b in zip(mine, theirs, strict=True)
    ]
    weights = [(a.layer if a.layer == b.layer else None) for a, b in zip(mine, theirs, strict=True)]
    joined = {k for k in weights if k is not None and agree[k]}
    return [
        Pair(a, b, k in joined, _sizes(a, bias=k in joined) if agree[k] else None)
        for k, (a, b) in enumerate(zip(mine, theirs, strict=True))
        if weights[k] not in joined
    ]


def _sizes(leaf: Leaf, *, bias: bool) -> tuple[Sizes, ...]:
    return tuple(Sizes(_left_size(form, bias=bias), divisor(magnitude(form.right, -1))) for form in factors(leaf) or ())


def _left_size(form: Factored, *, bias: bool) -> Float[Array, "n rows groups T 1"]:
    size = form.left_size(bias=bias)
    return size if bias else divisor(size)  # with a bias it is at least one


def _flat(blocks: Float[Array, "n rows m rows2"]) -> Float[Array, "n*rows m*rows2"]:
    return blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)


def _strips(pairs: Sequence[Pair], factor: Scalar) -> Float[Array, "rows rows"]:
    """Inner products of the rows of some leaves, strip by strip of the upper triangle."""
    examples, rows = pairs[0].mine.examples, pairs[0].mine.rows
    size = max(-(-examples // 4), -(-256 // rows))
    strips = []
    for start in range(0, examples, size):
        some, rest = slice(start, start + size), slice(start, examples)
        strip = total([_gram(pair.cut(some, rest), factor) for pair in pairs])
        strips.append(jnp.pad(_flat(strip), ((0, 0), (start * rows, 0))) if start else _flat(strip))
    return jnp.concatenate(strips) if strips[1:] else strips[0]


def _own_gram(leaf: Leaf, factor: Scalar) -> Float[Array, "rows rows"]:
    """Inner products of all pairs of gradients. Each gradient is formed only once."""
    blocks = jnp.sum(by_columns(lambda d: _inner_formed(d, d, factor), leaf), 0)
    return _flat(jnp.broadcast_to(blocks, (leaf.examples, leaf.rows, leaf.examples, leaf.rows)))


def _gram(pair: Pair, factor: Scalar) -> Float[Array, "n rows m rows2"]:
    """The inner products of one leaf, the gradients being multiplied by ``factor``."""
    mine, theirs = pair.mine, pair.theirs
    shape = (mine.examples, mine.rows, theirs.examples, theirs.rows)
    if not mine.forms or not theirs.forms:
        return jnp.zeros(shape, mine.dtype)
    if pair.sizes is not None:
        return jnp.broadcast_to(_by_factors(pair, factor), shape)
    # Formed gradients have no layout of their own and take that of the other side.
    if mine.layout != theirs.layout and any(form.layout is not None for form in theirs.forms):
        mine, theirs = mine.formed(), theirs.formed()
    products = partial(_inner_formed, factor=factor)
    return jnp.broadcast_to(jnp.sum(by_columns(products, mine, theirs), 0), shape)


def _inner_formed(mine: Array, theirs: Array, factor: Scalar) -> Float[Array, "n r m q"]:
    flat = [x.reshape(x.shape[0] * x.shape[1], -1) for x in (mine, theirs)]
    return (matmul(flat[0] * factor, flat[1].T) * factor).reshape(*mine.shape[:2], *theirs.shape[:2])


def _by_factors(pair: Pair, factor: Scalar) -> Float[Array, "n rows m rows2"]:
    """Inner products from the factors, for some examples at a time if those of all would take too much memory."""
    mine = pair.mine
    counts = [max(math.prod(x.right.shape[k] for k in (0, 1, 3)) for x in factors(leaf) or ()) for leaf in pair[:2]]
    size = counts[0] * counts[1] * mine.layout.groups
    if size <= room() or mine.examples == 1 or mine.positions == 1:
        return _all_pairs(pair, factor)
    full = jax.tree.map(lambda x: jnp.broadcast_to(x, (mine.examples, *x.shape[1:])), (mine.forms, pair.sizes))
    flat, treedef = jax.tree.flatten(full)

    def some(*flat: Array) -> Array:
        forms, sizes = jax.tree.unflatten(treedef, flat)
        part = Leaf(forms, mine.shape, mine.dtype, flat[0].shape[0], mine.rows)
        return _all_pairs(pair._replace(mine=part, sizes=sizes), factor)

    return map_batches(some, tuple(flat), few(size / mine.examples))


def _all_pairs(pair: Pair, factor: Scalar) -> Float[Array, "n rows m rows2"]:
    """The sum over pairs of forms; with a bias, the layer has a last input that is one.

    The factors of ``mine`` are scaled near one, multiplied with those of ``theirs``, and scaled back afterwards: no product in
    between is larger than a gradient, and rows that are small beside others keep their digits. No array of ``theirs`` is
    copied.
    """
    if pair.sizes is not None and _is_shifted(pair.mine) and _is_shifted(pair.theirs):
        return jnp.sum(_shifted_pairs(pair.mine.forms, pair.theirs.forms, pair.sizes, factor), (0, 3, 6))
    parts = []
    for one, sizes in zip(factors(pair.mine) or (), pair.sizes or (), strict=True):
        for two in factors(pair.theirs) or ():
            lefts = _inner_left(one, two, sizes.left)
            rights = inner(one.right / sizes.right, two.right)
            products = lefts * rights * factor * _beside(factor * (sizes.left * sizes.right))
            if pair.bias:
                products = products + rights * factor * _beside(factor * sizes.right)
            parts.append(jnp.sum(products, (0, 3, 6)))
    return total(parts)


def _is_shifted(leaf: Leaf) -> bool:
    """Whether the leaf's forms are the two that `Product.shifted` returns."""
    return len(leaf.forms) == 2 and type(leaf.forms[0]) is Product and isinstance(leaf.forms[1], Deviation)


def _shifted_pairs(mine: Any, theirs: Any, sizes: tuple[Sizes, ...], factor: Scalar) -> Float[Array, "b n r t m q s"]:
    """Inner products of gradients ``a (x) (g + G) + A (x) g``, with capitals for constants.

    The sum ``(a.b) (g+G).(h+H) + (a.B) (g+G).h + (A.b) g.(h+H) + (A.B) g.h`` is multiplied out, so that only ``a.b`` and
    ``g.h`` are products of matrices.
    """
    (moving, still), (others, rest) = mine, theirs
    largest = divisor(magnitude(still.mean, -1))
    left, right = jnp.maximum(sizes[0].left, sizes[1].left), jnp.maximum(sizes[1].right, largest)

    def constant(value: Array, size: Array, whole: Array, other: Array) -> Array:
        return inner(value / size, other) * _beside(size / whole)

    lefts, rights = moving.left / left, still.right / right
    a_b, g_h = inner(lefts, others.left), inner(rights, rest.right)
    a_mean, g_mean = inner(lefts, rest.left), inner(rights, rest.mean)
    mean_b, means = (constant(still.left, sizes[1].left, left, other) for other in (others.left, rest.left))
    mean_h, centres = (constant(still.mean, largest, right, other) for other in (rest.right, rest.mean))
    products = g_h * (a_b + a_mean + mean_b + means) + a_b * (g_mean + mean_h + centres) + a_mean * mean_h + mean_b * g_mean
    return products * factor * (factor * _beside(left * right))


def _beside(size: Float[Array, "n rows groups T 1"]) -> Float[Array, "groups n rows T 1 1 1"]:
    """Numbers for the factors of one block of rows, with axes to broadcast against all pairs with those of another block."""
    return jnp.moveaxis(size, 2, 0)[..., None, None]


def _inner_left(one: Factored, two: Factored, size: Array) -> Float[Array, "b n r t m q s"]:
    """Inner products of left factors, the first ones scaled near one; the left factors of a table are ones and zeros."""
    match one, two:
        case Lookup(), Lookup():
            return one.same(two).astype(one.right.dtype)
        case Lookup(), Product():
            return jnp.moveaxis(one.picked(two.left), (1, 2, 3), (4, 5, 6))
        case Product(), Lookup():
            return two.picked(one.left / size)
        case Product(), Product():
            return inner(one.left / size, two.left)
    raise TypeError(f"no inner products of {type(one).__name__} and {type(two).__name__}")
