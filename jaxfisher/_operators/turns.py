"""What is held of Kronecker factors between refreshes: each layer's made anew in its turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Scalar

from jaxfisher._once import renewed
from jaxfisher._operators.factored import damped_factors, inverses, with_inverses
from jaxfisher._operators.form import Form
from jaxfisher._operators.kronecker import Kronecker, eigenvectors
from jaxfisher._operators.sum import Sum

Matrices = Float[Array, "groups m m"]
Flag = bool | Bool[Array, ""]


class Holding(NamedTuple):
    """A way to hold the factors of the layers of a form, so that solves take products only.

    Attributes:
        factors: what is taken of a form at a damping: two stacks of matrices a layer.
        make: what is held of such a stack, whatever its size.
        form: a form, what is held of its factors in order, and the damping of now, to the form that is solved with.
    """

    factors: Callable[[Form, Scalar], Sequence[Matrices]]
    make: Callable[[Matrices], Any]
    form: Callable[[Form, Sequence[Any], Scalar], Form]

    def shapes(self, form: Form) -> list[Any]:
        """What is held of a form that may be without values, without values."""
        return jax.eval_shape(lambda form: [self.make(x) for x in self.factors(form, jnp.ones((), form.spec.dtype))], form)

    def refreshed(self, form: Form, damping: Scalar, due: Sequence[Flag], held: Sequence[Any]) -> list[Any]:
        """What is held of the factors: made anew of the layers that are due."""
        factors = self.factors(form, damping)
        if all(flag is True for flag in due):
            return _together(self.make, factors)
        made = [partial(_ignoring, self.make, x) for x in factors]
        flags = [flag for flag in due for _ in range(2)]
        return [renewed(flag, make, old) for flag, make, old in zip(flags, made, held, strict=True)]


def _ignoring(make: Callable[[Matrices], Any], factor: Matrices, held: Any) -> Any:
    del held
    return make(factor)


def _together(make: Callable[[Matrices], Any], factors: Sequence[Matrices]) -> list[Any]:
    """What is made of all of them, those of one size in one call."""
    made: dict[int, Any] = {}
    for size in sorted({x.shape[1] for x in factors}):
        places = [i for i, x in enumerate(factors) if x.shape[1] == size]
        ends = np.cumsum([len(factors[i]) for i in places])
        whole = make(jnp.concatenate([factors[i] for i in places]))
        for i, end in zip(places, ends, strict=True):
            made[i] = jax.tree.map(lambda x, i=i, end=end: x[end - len(factors[i]) : end], whole)
    return [made[i] for i in range(len(factors))]


INVERSES = Holding(damped_factors, inverses, with_inverses)
"""The inverses of the damped factors: see `jaxfisher.factored_solve`."""


def _bare_factors(form: Form, damping: Scalar) -> list[Matrices]:
    del damping
    return [factor for block in _products(form) for factor in (block.inputs, block.outputs)]


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
