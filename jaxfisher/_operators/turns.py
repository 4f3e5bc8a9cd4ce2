"""What is held of Kronecker factors between refreshes: each layer's made anew in its turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Scalar

from jaxfisher._bordered import Bordered
from jaxfisher._jobs_on_mesh import Devices, shared_out
from jaxfisher._once import renewed, repeat
from jaxfisher._operators.apart import devices_of, together
from jaxfisher._operators.factored import inverses, shifted_factors, with_inverses
from jaxfisher._operators.form import Form
from jaxfisher._operators.kronecker import Kronecker
from jaxfisher._operators.side import eigenvectors
from jaxfisher._operators.sum import Sum

Shifts = Float[Array, " groups"]
Flag = bool | Bool[Array, ""]


class Holding(NamedTuple):
    """A way to hold the factors of the layers of a form, so that solves take products only.

    Factors of one size are held together, and with ``pads`` those of nearly one size too: the program has one body for each.

    Attributes:
        factors: what is taken of a form at a damping: for each layer two stacks of matrices, each with what is added to the
            diagonals of its matrices.
        make: what is held of a stack of matrices, whatever its size.
        form: a form, what is held of its factors in order, and the damping of now, to the form that is solved with.
        pads: whether what is made of a block-diagonal matrix is what is made of its blocks.
    """

    factors: Callable[[Form, Scalar], Sequence[tuple[Bordered, Shifts]]]
    make: Callable[[Bordered], Any]
    form: Callable[[Form, Sequence[Any], Scalar], Form]
    pads: bool

    def layers(self, form: Form) -> int:
        """How many layers have factors that are held."""
        return len(jax.eval_shape(self.factors, form, jnp.ones((), form.spec.dtype))) // 2

    def shapes(self, form: Form) -> list[Any]:
        """What is held of a form that may be without values, without values."""

        def made(form: Form) -> list[Any]:
            factors = self.factors(form, jnp.ones((), form.spec.dtype))
            return [self.make(stack.matrices(factors)) for stack in _stacks(factors, pads=self.pads)]

        return jax.eval_shape(made, form)

    def refreshed(self, form: Form, damping: Scalar, due: Sequence[Flag], held: Sequence[Any]) -> list[Any]:
        """What is held of the factors: made anew of the layers that are due."""
        factors = self.factors(form, damping)
        stacks, devices = _stacks(factors, pads=self.pads), devices_of(form)
        if devices is not None:
            return _made_apart(self.make, stacks, factors, due, held, devices)
        if all(flag is True for flag in due):
            return [self.make(stack.matrices(factors)) for stack in stacks]
        return [_renewed(self.make, stack, factors, due, old) for stack, old in zip(stacks, held, strict=True)]

    def solved_with(self, form: Form, held: Sequence[Any], damping: Scalar) -> Form:
        """The form that is solved with."""
        factors = jax.eval_shape(self.factors, form, damping)
        parts: dict[int, Any] = {}
        for stack, made in zip(_stacks(factors, pads=self.pads), held, strict=True):
            parts |= stack.parts(factors, made)
        return self.form(form, [parts[k] for k in range(len(factors))], damping)


class _Stack(NamedTuple):
    """Factors that are held together: their places among all, and the size to which they are padded, without a border."""

    places: tuple[int, ...]
    size: int

    def matrices(self, factors: Sequence[tuple[Bordered, Shifts]]) -> Bordered:
        """The matrices with what is added to their diagonals; where they are padded, with a unit matrix."""
        return _shifted(*self.padded(factors))

    def padded(self, factors: Sequence[tuple[Bordered, Shifts]]) -> tuple[Bordered, Float[Array, "groups m"]]:
        """The matrices, and what is to be added to their diagonals: one where they are padded."""
        padded = [_padded(*factors[place], self.size) for place in self.places]
        whole: tuple[Bordered, Float[Array, "groups m"]] = jax.tree.map(lambda *parts: jnp.concatenate(parts), *padded)
        return whole

    def parts(self, factors: Sequence[tuple[Any, Any]], made: Any) -> dict[int, Any]:
        """What was made, of each of the factors."""
        ends = np.cumsum([len(factors[place][0].core) for place in self.places])
        found = {}
        for place, end in zip(self.places, ends, strict=True):
            matrix, _ = factors[place]
            count, size = matrix.core.shape[:2]
            inside = slice(None) if size == self.size else slice(size)
            cut = lambda x, end=end, count=count, inside=inside: x[(slice(end - count, end), *(inside,) * (x.ndim - 1))]  # noqa: E731
            found[place] = jax.tree.map(cut, made)
        return found


def _padded(matrix: Bordered, shift: Shifts, size: int) -> tuple[Bordered, Float[Array, "groups m"]]:
    """Matrices of a larger size, and what is to be added to the diagonals of their cores."""
    own = jnp.broadcast_to(shift[:, None], matrix.core.shape[:2])
    extra = size - matrix.core.shape[1]
    if not extra:
        return matrix, own
    wide = matrix._replace(core=jnp.pad(matrix.core, ((0, 0), (0, extra), (0, extra))))
    if matrix.border is not None:
        wide = wide._replace(border=jnp.pad(matrix.border, ((0, 0), (0, extra), (0, 0))))
    return wide, jnp.pad(own, ((0, 0), (0, extra)), constant_values=1)


def _shifted(matrices: Bordered, diagonals: Float[Array, "groups m"]) -> Bordered:
    """Matrices with what is added to their diagonals; a corner has what the first entry has, which is never padding."""
    size, dtype = matrices.core.shape[1], matrices.core.dtype
    core = matrices.core + diagonals[:, None] * jnp.eye(size, dtype=dtype)[None]
    return Bordered(core, matrices.border, None if matrices.corner is None else matrices.corner + diagonals[:, :1, None])


PADDING = 1.1
"""How much longer inverses may take for the sake of a smaller program."""
TINY = 32
"""So much longer as one of this size takes they may take in any case."""


def _stacks(factors: Sequence[tuple[Any, Any]], *, pads: bool) -> list[_Stack]:
    """Factors by size, the largest first; where padding is allowed, smaller ones with larger ones while that costs little.

    Those with a border are apart from those without.
    """
    counts, sizes = ([matrix.core.shape[axis] for matrix, _ in factors] for axis in (0, 1))
    cost = sum(count * float(size) ** 3 for count, size in zip(counts, sizes, strict=True))
    spare = (PADDING - 1) * cost + TINY**3 if pads else 0.0
    found: dict[tuple[int, bool], list[int]] = {}
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        kind = factors[place][0].border is None
        size = min((other for other, of in found if of == kind and other >= sizes[place]), default=sizes[place])
        extra = counts[place] * (float(size) ** 3 - float(sizes[place]) ** 3)
        if extra > spare:
            size = sizes[place]
        else:
            spare -= extra
        found.setdefault((size, kind), []).append(place)
    return [_Stack(tuple(places), size) for (size, _), places in found.items()]


def _renewed(
    make: Callable[[Bordered], Any], stack: _Stack, factors: Sequence[tuple[Bordered, Shifts]], due: Sequence[Flag], held: Any
) -> Any:
    """What is held of one stack, made anew for the layers that are due, one matrix after the other."""
    flags = jnp.stack([jnp.asarray(due[place // 2]) for place in stack.places for _ in range(len(factors[place][1]))])
    numbers = np.arange(flags.size, dtype=np.int32)

    def following(number: Array | int) -> Array:
        return jnp.min(jnp.where(flags & (numbers > number), numbers, flags.size))

    def step(state: tuple[Array, Any]) -> tuple[Array, Any]:
        number, held = state
        # Places in the first axis that are known not to be negative.
        place = (number, *[jnp.zeros_like(number)] * 2)
        one = lambda x: jax.lax.dynamic_slice(x, place[: x.ndim], (1, *x.shape[1:]), allow_negative_indices=False)  # noqa: E731
        put = lambda x, new: jax.lax.dynamic_update_slice(x, new, place[: x.ndim], allow_negative_indices=False)  # noqa: E731
        return following(number), jax.tree.map(put, held, make(jax.tree.map(one, stack.matrices(factors))))

    return repeat(lambda state: state[0] < flags.size, step, (following(-1), held))[1]


def _made_apart(
    make: Callable[[Bordered], Any],
    stacks: Sequence[_Stack],
    factors: Sequence[tuple[Bordered, Shifts]],
    due: Sequence[Flag],
    held: Sequence[Any],
    devices: Devices,
) -> list[Any]:
    """What is held of each stack, those factors made anew that are due, each by one device: of one turn all together."""
    counts, sizes = [len(shift) for _, shift in factors], dict[int, int]()
    parts: dict[int, Any] = {}
    for stack, old in zip(stacks, held or [None] * len(stacks), strict=True):
        end, whole = 0, (stack.padded(factors), old)
        for place in stack.places:
            start, end = end, end + counts[place]
            sizes[place] = stack.size
            parts[place] = jax.tree.map(lambda x, start=start, end=end: x[start:end], whole)
    of_all = partial(together, lambda padded: make(_shifted(*padded)))
    found: dict[int, Any] = {}
    for _, turn in itertools.groupby(range(len(factors)), key=lambda place: id(due[place // 2])):
        places = tuple(turn)

        def made(held: list[Any], places: tuple[int, ...] = places) -> list[Any]:
            del held
            costs = [counts[place] * float(sizes[place]) ** 3 for place in places]
            return shared_out(of_all, [parts[place][0] for place in places], costs, devices)

        before: list[Any] = [parts[place][1] for place in places]
        after: list[Any] = renewed(due[places[0] // 2], made, before)
        found |= dict(zip(places, after, strict=True))
    return [jax.tree.map(lambda *part: jnp.concatenate(part), *(found[place] for place in stack.places)) for stack in stacks]


INVERSES = Holding(shifted_factors, inverses, with_inverses, pads=True)
"""The inverses of the damped factors: see `jaxfisher.factored_solve`."""


def _bare_factors(form: Form, damping: Scalar) -> list[tuple[Bordered, Shifts]]:
    del damping
    factors = [factor for block in _products(form) for factor in (block.input_side, Bordered(block.outputs))]
    return [(factor, jnp.zeros(len(factor.core), factor.core.dtype)) for factor in factors]


def _with_eigenvectors(form: Form, held: Sequence[Any], damping: Scalar) -> Form:
    del damping
    sides: Iterator[Any] = iter(held)
    return jax.tree.map(
        lambda part: part.by_eigenvectors(next(sides), next(sides)) if isinstance(part, Kronecker) else part,
        form,
        is_leaf=_whole,
    )


EIGENVECTORS = Holding(_bare_factors, eigenvectors, _with_eigenvectors, pads=False)
"""The eigenvectors and eigenvalues of the factors, for solves at any damping."""
NOTHING = Holding(lambda form, damping: [], lambda factor: factor, lambda form, held, damping: form, pads=False)
"""The form is solved with as it is."""


def _whole(part: Any) -> bool:
    # The terms of a sum stay as they are, since a solve with the sum makes its matrix.
    return isinstance(part, Kronecker | Sum)


def _products(form: Form) -> list[Kronecker]:
    return [part for part in jax.tree.leaves(form, is_leaf=_whole) if isinstance(part, Kronecker)]
