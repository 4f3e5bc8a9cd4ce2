"""What is held of Kronecker factors between refreshes: each layer's made anew in its turn."""

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
    """A way to hold the factors of the layers of a form, so that solves take products only.

    Attributes:
        factors: what is taken of a form at a damping: for each layer two stacks of matrices, each with what is added to the
            diagonals of its matrices.
        make: what is held of a stack of matrices.
        form: a form, what is held of its factors in order, and the damping of now, to the form that is solved with.
    """

    factors: Callable[[Form, Scalar], Sequence[tuple[Bordered, Shifts]]]
    make: Callable[[Bordered], Any]
    form: Callable[[Form, Sequence[Any], Scalar], Form]

    def layers(self, form: Form) -> int:
        """How many layers have factors that are held."""
        return len(jax.eval_shape(self.factors, form, jnp.ones((), form.spec.dtype))) // 2

    def shapes(self, form: Form) -> list[Any]:
        """What is held of a form that may be without values, without values."""

        def made(form: Form) -> list[Any]:
            return [self.make(matrices) for matrices, _ in self.factors(form, jnp.ones((), form.spec.dtype))]

        return jax.eval_shape(made, form)

    def refreshed(self, form: Form, damping: Scalar, due: Sequence[Flag], held: Sequence[Any]) -> list[Any]:
        """What is held of the factors, which may be nothing yet where all are due: made anew of the layers that are due.

        Those of one turn are made together. Each is held by itself: factors of one size in one array would have to be put
        together to be inverted and cut apart to be multiplied with, at every step, and each cut is a kernel of its own.
        """
        factors, devices = self.factors(form, damping), devices_of(form)
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
        """What is held of these factors, each made by one device where there are several for it."""
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
"""The form is solved with as it is."""


def _whole(part: Any) -> bool:
    # The terms of a sum stay as they are, since a solve with the sum makes its matrix.
    return isinstance(part, Kronecker | Sum)


def _products(form: Form) -> list[Kronecker]:
    return [part for part in jax.tree.leaves(form, is_leaf=_whole) if isinstance(part, Kronecker)]
