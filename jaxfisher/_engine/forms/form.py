"""The protocols of a form of a leaf's gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, Self

from jaxtyping import Array, Float

from jaxfisher._engine.forms.arrays import Seal
from jaxfisher._engine.forms.layout import Layout


class Form(Protocol):
    """The gradients of a parameter leaf, or some of the terms that add up to them, for all rows.

    Rows are indexed by (example, row of the example); an array that does not depend on one of these has length one along it.
    """

    @property
    def name(self) -> str:
        """The name that `jaxfisher.explain` shows."""

    @property
    def unfactored(self) -> str:
        """Why the form is not a sum of dense outer products, in a word or two; empty if it is such a sum."""

    @property
    def layout(self) -> Layout | None:
        """How the factors make up the leaf; None for a form without factors."""

    @property
    def positions(self) -> int:
        """T, the number of outer products whose sum a row is; 0 if a row is no such sum."""

    @property
    def making(self) -> int:
        """How many numbers `made` computes for one example, beside those that the form stores."""

    def made(self) -> Made:
        """The form with its factors computed: the one that products are taken with."""

    def sizes(self, *, bias: bool) -> Float[Array, "n rows"]:
        """A bound on the entries of each row, of their order of magnitude; with ``bias`` also on those of the layer's bias."""

    def means(self, w: Float[Array, "n rows"], by_row: bool) -> tuple[Array, ...]:
        """Weighted means of the arrays of the form, for `shifted`.

        Left factors are also weighted by the size of the right ones. The means are over examples and rows, or with ``by_row``
        over examples only.
        """

    def shifted(self, means: tuple[Array, ...]) -> tuple[Form, ...]:
        r"""Forms that add up to the gradients less a constant, which is near their mean if ``means`` are those of `means`.

        With ``a = a' + A`` and ``g = g' + G`` the gradient ``a (x) g`` is ``a' (x) g + A (x) g'`` and the constant ``A (x) G``,
        which is left out. The arrays of the result are then as small as the deviations.
        """

    def changed(self, change: Callable[[Array], Array]) -> Form:
        """The form with a linear map applied to the right factors that multiplies each entry of the gradients by a number."""


class InPositions:
    """What is the same in all forms whose rows are sums of outer products, with a right factor at each position."""

    right: Float[Array, "n rows groups T outputs"]

    @property
    def positions(self) -> int:
        """See `Form`."""
        return int(self.right.shape[3])

    def changed(self, change: Callable[[Array], Array]) -> Self:
        """See `Form`."""
        return dataclasses.replace(self, right=change(self.right))  # type: ignore[type-var]


class Made(Form, Protocol):
    """A form whose factors are all computed. The leaf has any shape ``*shape``."""

    def mv(self, v: Float[Array, "*shape"], seal: Seal) -> Float[Array, "n rows"]:
        """``D . V`` for every row."""

    def rmv(self, w: Float[Array, "n rows"]) -> Float[Array, "*shape"]:
        """``sum_rows w D``."""

    def gradient(self) -> Float[Array, "n rows *shape"]:
        """The gradients themselves."""

    def matrices(self, layout: Layout) -> Float[Array, "n rows groups inputs outputs"]:
        """The gradients as matrices of a layout, which must be the form's own if it has one."""

    def columns(self, layout: Layout, start: Array, size: int) -> Float[Array, "n rows groups size outputs"]:
        """The inputs ``start`` to ``start + size`` of `matrices`."""


class Factored(Made, Protocol):
    """A form whose inner products can be computed from those of its left and right factors, one pair per position."""

    @property
    def right(self) -> Float[Array, "n rows groups T outputs"]:
        """The right factors."""

    def left_size(self, *, bias: bool) -> Float[Array, "n rows groups T 1"]:
        """The largest entries of left factors; with a ``bias``, of factors that end in one."""

    def squared(self) -> Float[Array, "n rows groups"]:
        """``|D|^2`` of every row, group by group."""

    def squares(self) -> Made:
        """The form whose gradients are the entrywise squares; exact if no entry is a sum over two positions."""
