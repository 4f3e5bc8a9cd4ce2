"""Products that are not formed: a weight's gradient, stopped one operation before its outer product.

A `Term` is a product of factors in index notation: each factor is an array whose axes are named by `Axis` objects, and the
value is their product summed over every axis that is not in ``dims``. So ``dims = ((i,), (o,))`` with factors ``a`` over
``(t, i)`` and ``g`` over ``(t, o)`` is ``sum_t a_ti g_to``, an outer product summed over positions. Transposes, reshapes, pads
and the like act on the axes and leave the product unformed. A function here returns None if it cannot do that, and the caller
then forms the value in the ordinary way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxfisher._engine.axes import Axis, Origin, cut, dim, refined, rows_first
from jaxfisher._engine.windows import Windows
from jaxfisher._tree import HIGHEST

Change = Callable[[Array, int], Array]
"""A function of an array and of the axis to act on."""


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """An array with named axes.

    Attributes:
        array: the numbers; with ``hot``, positions along that axis.
        axes: the names of the array's axes.
        flags: whether the factor depends on the example, and on the row.
        hot: an axis along which the factor is one at the positions that the array holds, and zero elsewhere.
        reason: why this gradient had to be formed, if it had to be.
        place: the position along ``hot``, if it is known at trace time because a leaf was cut into parts.
        origin: the value of the program whose entries ``array`` holds rearranged. It counts only as long as ``array`` is the
            same object: an operation that changes the numbers makes another array, and so drops the origin.
    """

    array: Array | Windows
    axes: tuple[Axis, ...]
    flags: int
    hot: Axis | None = None
    reason: str | None = None
    place: int | None = None
    origin: Origin | None = None

    @property
    def source(self) -> Origin:
        """The value of the program that the factor holds, None if there is none, and how its axes go through it."""
        known = self.origin is not None and self.origin.array is self.array
        return self.origin if known and self.origin else Origin(self.plain, self.plain, rows_first(self.axes))

    @property
    def over(self) -> tuple[Axis, ...]:
        """All axes, the hot one included."""
        return self.axes if self.hot is None else (*self.axes, self.hot)

    @property
    def size(self) -> int:
        """How many numbers the factor holds."""
        return math.prod(axis.size for axis in self.axes)

    @property
    def plain(self) -> Array | None:
        """The array of an ordinary factor; None for windows and positions, which do not take part in arithmetic."""
        return self.array if self.hot is None and not isinstance(self.array, Windows) else None


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """A product of factors; ``dims`` gives each dimension of its value as the axes that make it up, in row-major order."""

    factors: tuple[Factor, ...]
    dims: tuple[tuple[Axis, ...], ...]

    @property
    def is_product(self) -> bool:
        """Whether forming it would multiply something out."""
        return len(self.factors) > 1 or any(factor.plain is None for factor in self.factors)

    @property
    def is_smaller(self) -> bool:
        """Whether the factors hold fewer numbers than the value has, or the term is a product."""
        return self.is_product or sum(f.size for f in self.factors) < math.prod(a.size for axes in self.dims for a in axes)


@dataclasses.dataclass(eq=False)
class Unformed:
    """A value as a sum of terms, and the ordinary way to form it, which runs at most once."""

    terms: tuple[Term, ...]
    form: Callable[[], Array]
    _formed: Array | None = None

    def formed(self) -> Array:
        """The value itself."""
        if self._formed is None:
            self._formed = self.form()
        return self._formed

    @property
    def is_product(self) -> bool:
        """Whether forming it would multiply something out."""
        return any(term.is_product for term in self.terms)

    @property
    def repeats(self) -> bool:
        """Whether the value is the same along some axis."""
        dims = [(term, axis) for term in self.terms for axes in term.dims for axis in axes]
        return any(all(axis not in factor.over for factor in term.factors) for term, axis in dims)

    @property
    def is_large(self) -> bool:
        """Whether the formed value is larger than its factors."""
        size = max((math.prod(a.size for axes in term.dims for a in axes) for term in self.terms), default=0)
        return self.is_product and size > sum(factor.size for term in self.terms for factor in term.factors)


def whole(array: Array, flags: int, reason: str | None) -> Term:
    """An ordinary array as a term of one factor."""
    axes = tuple(Axis(size) for size in array.shape)
    return Term((Factor(array, axes, flags, reason=reason),), tuple(map(dim, axes)))


def laid_out(term: Term) -> Array:
    """The value of a term of one factor: its axes in dimensions, each merged into one, and the others summed over."""
    (factor,) = term.factors
    order = [axis for axes in term.dims for axis in axes]
    axes = [axis for axis in factor.axes if axis in order]
    array, gone = jnp.asarray(factor.plain), [i for i, axis in enumerate(factor.axes) if axis not in order]
    if gone:  # without axes `jnp.sum` would still add an operation
        array = jnp.sum(array, gone)
    array = array.transpose([axes.index(axis) for axis in order if axis in axes])
    array = array.reshape([axis.size if axis in axes else 1 for axis in order])
    array = jnp.broadcast_to(array, [axis.size for axis in order])
    return array.reshape([math.prod(axis.size for axis in axes) for axes in term.dims])


def transpose(term: Term, permutation: Sequence[int]) -> Term:
    """The dimensions in another order."""
    return dataclasses.replace(term, dims=tuple(term.dims[i] for i in permutation))


def reshape(term: Term, shape: Sequence[int]) -> Term | None:
    """The term with its dimensions merged and split to ``shape``; axes are split if necessary."""
    axes = [axis for old in term.dims for axis in old]
    dims: list[tuple[Axis, ...]] = []
    for size in shape:
        made: list[Axis] = []
        missing = size
        while missing > 1:
            axis = axes.pop(0)
            if missing % axis.size == 0:
                made.append(axis)
                missing //= axis.size
                continue
            if axis.size % missing:
                return None
            parts = (Axis(missing), Axis(axis.size // missing))
            split = _split(term, axis, parts)
            if split is None:
                return None
            term = split
            dims = [tuple(_replaced(d, axis, parts)) for d in dims]
            axes.insert(0, parts[1])
            made.append(parts[0])
            missing = 1
        dims.append(tuple(made))
    return Term(term.factors, tuple(dims))


def _replaced(axes: Sequence[Axis], old: Axis, new: Sequence[Axis]) -> list[Axis]:
    return [part for axis in axes for part in (new if axis is old else (axis,))]


def _split(term: Term, axis: Axis, parts: tuple[Axis, Axis]) -> Term | None:
    """The term with ``axis`` replaced by two axes whose sizes multiply to its own."""
    factors = []
    for factor in term.factors:
        if axis not in factor.over:
            factors.append(factor)
            continue
        if factor.hot is axis or isinstance(factor.array, Windows):
            return None
        axes = tuple(_replaced(factor.axes, axis, parts))
        array = factor.array.reshape([a.size for a in axes])
        known = factor.source
        halves = cut(known.steps[axis], parts[0].size) if axis in known.steps else None
        steps = None if halves is None else {**known.steps, **dict(zip(parts, halves, strict=True))}
        origin = None if steps is None else known._replace(array=array, steps=steps)
        factors.append(dataclasses.replace(factor, array=array, axes=axes, origin=origin))
    return Term(tuple(factors), tuple(tuple(_replaced(dim, axis, parts)) for dim in term.dims))


def broadcast(term: Term, shape: Sequence[int], dimensions: Sequence[int]) -> Term:
    """`jax.lax.broadcast_in_dim`: a new dimension is an axis that no factor has."""
    dims = [dim(Axis(size)) for size in shape]
    for source, target in enumerate(dimensions):
        if math.prod(axis.size for axis in term.dims[source]) == shape[target]:
            dims[target] = term.dims[source]
    return Term(term.factors, tuple(dims))


def reduce_sum(term: Term, axes: Sequence[int]) -> Term | None:
    """The sum over dimensions. Their axes are contracted; one that no factor has multiplies the sum by its size."""
    gone = [axis for i in axes for axis in term.dims[i]]
    repeats = math.prod(axis.size for axis in gone if not any(axis in factor.over for factor in term.factors))
    kept = Term(term.factors, tuple(axes_ for i, axes_ in enumerate(term.dims) if i not in axes))
    return kept if repeats == 1 else scale(kept, repeats)


def scale(term: Term, number: Array | complex, flags: int = 0) -> Term | None:
    """The product with a scalar, multiplied into the smallest factor. A Python number takes the factor's precision."""
    sizes = [math.prod(a.size for a in f.axes) if f.plain is not None else math.inf for f in term.factors]
    if not sizes or min(sizes) == math.inf:
        return None
    index = sizes.index(min(sizes))
    factor = term.factors[index]
    array = _product(jnp.asarray(factor.plain), _number(number, jnp.asarray(factor.plain).dtype))
    scaled = dataclasses.replace(factor, array=array, flags=factor.flags | flags)
    return dataclasses.replace(term, factors=(*term.factors[:index], scaled, *term.factors[index + 1 :]))


def _number(number: Array | complex, like: Any) -> Array:
    """A number as an array. A Python number takes the precision of ``like``; a complex one stays complex."""
    if not isinstance(number, int | float | complex):
        return jnp.asarray(number)
    return jnp.asarray(number, wider(like, jnp.complex64) if isinstance(number, complex) else like)


def entrywise(term: Term, change: Callable[[Array], Array]) -> Term | None:
    """A function of each entry of the value, linear or not; None unless the term is one factor with nothing summed."""
    if len(term.factors) != 1 or term.factors[0].plain is None or _contracted(term):
        return None
    (factor,) = term.factors
    return dataclasses.replace(term, factors=(dataclasses.replace(factor, array=change(jnp.asarray(factor.plain))),))


def along(term: Term, index: int, change: Change, size: int, start: int | None = None) -> Term | None:
    """A linear map that moves or drops the entries along one dimension (a pad, a slice, a flip).

    ``change`` must send zero to zero and must not mix entries, so that it can act on each factor that has the axis. If it keeps
    only the entries from ``start`` on, the factors still know where they are from.
    """
    if len(term.dims[index]) != 1:
        return None
    (old,), new = term.dims[index], Axis(size)
    factors = []
    for factor in map(seen, term.factors):
        if old not in factor.over:
            factors.append(factor)
        elif factor.plain is None:
            return None
        else:
            axes = tuple(new if axis is old else axis for axis in factor.axes)
            array, known, origin = change(factor.plain, factor.axes.index(old)), factor.source, None
            if start is not None and len(steps := known.steps.get(old, ())) == 1:
                stride = steps[0][1]
                origin = Origin(array, known.value, {**known.steps, new: ((size, stride),)}, known.start + start * stride)
            factors.append(dataclasses.replace(factor, array=array, axes=axes, origin=origin))
    if not any(new in factor.over for factor in factors):
        return None
    return Term(tuple(factors), (*term.dims[:index], dim(new), *term.dims[index + 1 :]))


def seen(factor: Factor) -> Factor:
    """The factor, with the windows of a convolution expanded into an ordinary array."""
    return dataclasses.replace(factor, array=factor.array.array()) if isinstance(factor.array, Windows) else factor


def place(term: Term, index: int, position: int, size: int) -> Term:
    """The term with a dimension of length one put at a position of a longer one, with zeros elsewhere."""
    axis = Axis(size)
    at = Factor(jnp.asarray(position, jnp.int32), (), 0, hot=axis, place=position)
    return Term((*term.factors, at), (*term.dims[:index], (axis,), *term.dims[index + 1 :]))


def multiply(left: Term, right: Term) -> Term | None:
    """The elementwise product, if it has at most two factors once those over fewer axes are multiplied into others."""
    if left.is_product and right.is_product:
        return None
    # A product of two sums is not the sum of the products over a shared axis: at most one side may contract.
    if _contracted(left) and _contracted(right):
        return None
    product = left.is_product or right.is_product
    # The same value may come from both sides in different arrangements, so only the dimensions decide which axes are the same:
    # the right term gets new axes first.
    matched = _matched(left, _renamed(right, {}))
    if matched is None:
        return None
    left, right = matched
    names = {r: axis for d, e in zip(left.dims, right.dims, strict=True) for axis, r in zip(d, e, strict=False)}
    right = _renamed(right, names)
    # A dimension of length one broadcasts against any length.
    dims = tuple(d or e for d, e in zip(left.dims, right.dims, strict=True))
    folded = fold(Term((*left.factors, *right.factors), dims))
    # A single factor would be the formed product, and three factors are more than an outer product.
    return folded if len(folded.factors) == 2 or (len(folded.factors) == 1 and not product) else None


def _renamed(term: Term, names: Mapping[Axis, Axis]) -> Term:
    """The term with these names for its axes, and new axes in place of the others."""
    new: dict[Axis, Axis] = dict(names)

    def name(axis: Axis) -> Axis:
        return new.setdefault(axis, Axis(axis.size))

    factors = tuple(
        dataclasses.replace(
            factor, axes=tuple(map(name, factor.axes)), hot=None if factor.hot is None else name(factor.hot), origin=None
        )
        for factor in term.factors
    )
    return Term(factors, tuple(tuple(map(name, axes)) for axes in term.dims))


def _contracted(term: Term) -> bool:
    kept = {axis for axes in term.dims for axis in axes}
    return any(axis not in kept for factor in term.factors for axis in factor.over if axis.size > 1)


def _matched(left: Term, right: Term) -> tuple[Term, Term] | None:
    """Both terms, with their axes split so that dimensions of the same length are made of axes of the same sizes."""
    fine = [refined(a, b) for a, b in zip(_sizes(left), _sizes(right), strict=True)]
    made = []
    for term in (left, right):
        parts = [part if axes else () for part, axes in zip(fine, term.dims, strict=True)]
        if any(part is None for part in parts):
            return None
        split = reshape(term, [size for part in parts for size in part or ()])
        if split is None:
            return None
        axes = iter(split.dims)
        made.append(Term(split.factors, tuple(tuple(a for _ in part or () for a in next(axes)) for part in parts)))
    return made[0], made[1]


def _sizes(term: Term) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(axis.size for axis in axes) for axes in term.dims)


def fold(term: Term) -> Term:
    """The term with every factor over a subset of another's axes multiplied into that one."""
    factors = list(term.factors)
    while (pair := _foldable(factors)) is not None:
        small, host = pair
        if small.plain is None or host.plain is None:
            break
        array = _product(host.plain, _aligned(small.plain, small.axes, host.axes))
        flags, reason = host.flags | small.flags, host.reason or small.reason
        merged = dataclasses.replace(host, array=array, flags=flags, reason=reason)
        factors = [merged if factor is host else factor for factor in factors if factor is not small]
    return Term(tuple(factors), term.dims)


def _foldable(factors: Sequence[Factor]) -> tuple[Factor, Factor] | None:
    """A factor and another that has all of its axes."""
    for small in factors:
        hosts = [f for f in factors if f is not small and f.plain is not None and set(small.axes) <= set(f.axes)]
        if small.plain is not None and hosts:
            return small, min(hosts, key=lambda factor: len(factor.axes))
    return None


def _product(a: Array, b: Array) -> Array:
    """``a * b`` in the wider dtype. Factors may differ in dtype, because casts on the way to a gradient are postponed."""
    dtype = wider(a.dtype, b.dtype)
    return a.astype(dtype) * b.astype(dtype)


def wider(a: Any, b: Any) -> Any:
    """The dtype that holds both."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def _aligned(array: Array, axes: tuple[Axis, ...], onto: tuple[Axis, ...]) -> Array:
    """``array`` over ``axes`` laid out to broadcast against an array over ``onto``."""
    order = sorted(range(len(axes)), key=lambda i: onto.index(axes[i]))
    return array.transpose(order).reshape([axis.size if axis in axes else 1 for axis in onto])


def contract(
    term: Term, dims: Sequence[int], matrix: Array, over: Sequence[int], flags: int, batch: tuple[Sequence[int], Sequence[int]]
) -> Term | None:
    """`jax.lax.dot_general` with a matrix along ``dims``; dimensions of the batch come first, the matrix's other axes last.

    None unless all of ``dims`` are axes of one factor.
    """
    if any(len(term.dims[i]) != 1 for i in (*dims, *batch[0])):
        return None
    gone, groups = ([term.dims[i][0] for i in of] for of in (dims, batch[0]))
    hosts = [f for f in term.factors if any(axis in f.over for axis in gone)]
    if len(hosts) != 1 or (plain := hosts[0].plain) is None:
        return None
    (host,) = hosts
    if any(axis not in host.axes for axis in gone):
        return None
    # A group that the factor lacks is another axis of the matrix.
    named = dict(zip(batch[1], groups, strict=True))
    both = {i: axis for i, axis in named.items() if axis in host.axes}
    rest = tuple(axis for axis in host.axes if axis not in gone and axis not in both.values())
    new = {i: named.get(i) or Axis(size) for i, size in enumerate(matrix.shape) if i not in over and i not in both}
    numbers: Any = (
        ([host.axes.index(axis) for axis in gone], list(over)),
        ([host.axes.index(axis) for axis in both.values()], list(both)),
    )
    # Multiply in the wider of the two dtypes: cast to the factor's dtype, a complex matrix would lose its imaginary part.
    wide = wider(plain.dtype, matrix.dtype)
    array = jax.lax.dot_general(plain.astype(wide), matrix.astype(wide), numbers, precision=HIGHEST)
    axes = (*both.values(), *rest, *new.values())
    factor = dataclasses.replace(host, array=array, axes=axes, flags=host.flags | flags)
    factors = tuple(factor if f is host else f for f in term.factors)
    kept = tuple(axes for i, axes in enumerate(term.dims) if i not in dims and i not in batch[0])
    return Term(factors, (*map(dim, groups), *kept, *(dim(axis) for i, axis in new.items() if i not in named)))


def real(term: Term) -> tuple[Term, ...] | None:
    """The real part: ``Re(a g) = Re a Re g - Im a Im g``, at most two terms. The windows of a convolution are real."""
    wide = [f for f in term.factors if f.plain is not None and jnp.issubdtype(f.plain.dtype, jnp.complexfloating)]
    if not wide:
        return (term,)
    if len(wide) > 2:
        return None

    def parts(part: Callable[[Array], Array], sign: int) -> Term:
        changed = {
            id(f): dataclasses.replace(f, array=(sign if k == 0 else 1) * part(f.plain))
            for k, f in enumerate(wide)
            if f.plain is not None
        }
        return Term(tuple(changed.get(id(f), f) for f in term.factors), term.dims)

    first = parts(jnp.real, 1)
    return (first,) if len(wide) == 1 else (first, parts(jnp.imag, -1))
