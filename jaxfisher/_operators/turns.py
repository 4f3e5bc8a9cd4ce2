"""The inverses or eigenvectors of Kronecker factors held between refreshes; each layer's are recomputed when it is due."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Scalar

from jaxfisher._bordered import Bordered
from jaxfisher._jobs_on_mesh import Devices, shared_out
from jaxfisher._once import renewed
from jaxfisher._operators.apart import devices_of
from jaxfisher._operators.factored import inverses, shifted_factors, with_inverses
from jaxfisher._operators.form import Form
from jaxfisher._operators.kronecker import Kronecker
from jaxfisher._operators.side import eigenvectors
from jaxfisher._operators.sum import Sum

Shifts = Float[Array, " groups"]
Flag = bool | Bool[Array, ""]


class Holding(NamedTuple):
    """A way to hold the factors of a form's layers, so that solves take products only.

    Attributes:
        factors: from a form and a damping to its factors: for each layer two stacks of matrices, each with the numbers to add
            to the diagonals of its matrices.
        make: from a stack of matrices to what is held of it: inverses, or eigenvectors.
        form: from a form, what is held of its factors in order, and the current damping to the form to solve with.
    """

    factors: Callable[[Form, Scalar], Sequence[tuple[Bordered, Shifts]]]
    make: Callable[[Bordered], Any]
    form: Callable[[Form, Sequence[Any], Scalar], Form]

    def shapes(self, form: Form) -> list[Any]:
        """The shapes of the held inverses or eigenvectors of a form, which may be without values."""

        def made(form: Form) -> list[Any]:
            return [self.make(matrices) for matrices, _ in self.factors(form, jnp.ones((), form.spec.dtype))]

        return jax.eval_shape(made, form)

    def refreshed(
        self, form: Form, factors: Sequence[tuple[Bordered, Shifts]], due: Sequence[Flag], held: Sequence[Any]
    ) -> list[Any]:
        """The held inverses or eigenvectors, recomputed for the layers that are due. ``held`` may be empty if all are due.

        ``factors`` are those of the form.

        Layers of one turn are recomputed together. Each factor is held in its own array: factors of one size in one array would
        have to be concatenated for inversion and sliced for products at every step, and each slice is a kernel of its own.
        """
        devices = devices_of(form)
        old, found = list(held) or [None] * len(factors), list[Any]()
        for _, turn in itertools.groupby(range(len(factors)), key=lambda place: id(due[place // 2])):
            places = list(turn)

            def anew(held: Any, places: list[int] = places) -> Any:
                del held
                return self._made([factors[place] for place in places], devices)

            before: list[Any] = [old[place] for place in places]
            found += renewed(due[places[0] // 2], anew, before)
        return found

    def _made(self, factors: Sequence[tuple[Bordered, Shifts]], devices: Devices | None) -> list[Any]:
        """The inverses or eigenvectors of these factors. If the form is spread over devices, one device computes each."""
        make = lambda factors: [self.make(matrices.shifted(shift)) for matrices, shift in factors]  # noqa: E731
        if devices is None:
            return make(factors)
        return shared_out(make, list(factors), [len(shift) * float(matrix.size) ** 3 for matrix, shift in factors], devices)


INVERSES = Holding(shifted_factors, inverses, with_inverses)
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


EIGENVECTORS = Holding(_bare_factors, eigenvectors, _with_eigenvectors)
"""The eigenvectors and eigenvalues of the factors, for solves at any damping."""
NOTHING = Holding(lambda form, damping: [], lambda factor: factor, lambda form, held, damping: form)
"""Holds nothing: the form itself is solved with."""


def _whole(part: Any) -> bool:
    # Leave the terms of a sum as they are, since a solve with the sum makes its matrix.
    return isinstance(part, Kronecker | Sum)


def _products(form: Form) -> list[Kronecker]:
    return [part for part in jax.tree.leaves(form, is_leaf=_whole) if isinstance(part, Kronecker)]
