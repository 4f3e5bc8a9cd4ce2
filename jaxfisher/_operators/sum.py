"""The sum of two forms: one form if the two combine, else both as they are held."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._operators.form import Form
from jaxfisher._pytree import array_fields
from jaxfisher._tree import ParamSpec


@array_fields("terms", repr=False)
class Sum(Form):
    """The sum of forms that do not combine: every term stays as it is held."""

    terms: tuple[Form, ...]
    spec: ParamSpec

    @property
    def name(self) -> str:  # type: ignore[override]
        """The names of the terms."""
        return " + ".join(term.name for term in self.terms)

    @property
    def averages(self) -> bool:  # type: ignore[override]
        """Whether every term averages."""
        return all(term.averages for term in self.terms)

    @property
    def halved(self) -> bool:  # type: ignore[override]
        """Whether every term is."""
        return all(term.halved for term in self.terms)

    @property
    def stack(self) -> tuple[int, ...]:
        return self.terms[0].stack

    def as_matrix(self) -> Float[Array, "p p"]:
        return _total(term.as_matrix() for term in self.terms)

    def diagonal(self) -> Any:
        return _total(term.diagonal() for term in self.terms)

    def product(self) -> Callable[[Any], Any]:
        products = [term.product() for term in self.terms]
        return lambda v: _total(product(v) for product in products)

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> Sum:
        return Sum(tuple(term.restrict(keep, treedef) for term in self.terms), self.spec.restrict(keep, treedef))

    def rescaled(self, factors: Sequence[Scalar]) -> Sum:
        return Sum(tuple(term.rescaled(factors) for term in self.terms), self.spec)

    def scaled(self, factor: Scalar) -> Sum:
        return Sum(tuple(term.scaled(factor) for term in self.terms), self.spec)

    def inner_products(self, vectors: Any) -> Float[Array, "k k"]:
        return _total(term.inner_products(vectors) for term in self.terms)


def added(a: Form, b: Form) -> Form:
    """The sum of two forms over the same parameters: one form if either of the two can make it, else a `Sum` of both."""
    made = a.plus(b)
    if made is None:
        made = b.plus(a)
    return Sum((a, b), a.spec) if made is None else made


def _total(parts: Iterable[Any]) -> Any:
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)
