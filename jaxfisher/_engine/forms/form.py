"""What a form of a leaf's gradients is: the few questions that every one of them answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from jaxtyping import Array, Float

from jaxfisher._engine.forms.arrays import Seal
from jaxfisher._engine.forms.layout import Layout


class Form(Protocol):
    """The gradients of a parameter leaf, or some of the terms that add up to them, for all rows.

    Rows are indexed by (example, row of the example); an array that does not depend on one of these has length one there.
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
        """How many numbers `made` takes for one example, beside those that are held."""

    def made(self) -> Made:
        """The form that products are taken with."""

    def sizes(self, *, bias: bool) -> Float[Array, "n rows"]:
        """A bound on the entries of each row, of their order of magnitude; with those of the bias of the layer."""

    def means(self, w: Float[Array, "n rows"], by_row: bool) -> tuple[Array, ...]:
        """Means of what is held, for `shifted`; of left factors by how much they count, which is the size of the right ones.

        They are over examples and rows, or ``by_row`` over examples only.
        """

    def shifted(self, means: tuple[Array, ...]) -> tuple[Form, ...]:
        r"""Terms that add up to the gradients less a constant, which is near their mean if ``means`` are near those held.

        With ``a = a' + A`` and ``g = g' + G`` the gradient ``a (x) g`` is ``a' (x) g + A (x) g'`` and the constant ``A (x) G``,
        which is left out. What is held is then as small as the deviations are.
        """

    def changed(self, change: Callable[[Array], Array]) -> Form:
        """With the gradients changed by a linear map from each of their entries to itself, made on the right factors."""


class Made(Form, Protocol):
    """A form with nothing left to make: leaves have any shape ``*shape``."""

    def mv(self, v: Float[Array, "*shape"], seal: Seal) -> Float[Array, "n rows"]:
        """``D . V`` for every row."""

    def rmv(self, w: Float[Array, "n rows"]) -> Float[Array, "*shape"]:
        """``sum_rows w D``."""

    def gradient(self) -> Float[Array, "n rows *shape"]:
        """The gradients themselves."""

    def matrices(self, layout: Layout) -> Float[Array, "n rows groups inputs outputs"]:
        """The gradients as matrices of a layout, which is its own if it has one."""

    def columns(self, layout: Layout, start: Array, size: int) -> Float[Array, "n rows groups size outputs"]:
        """Some of the inputs of `matrices`."""


class Factored(Made, Protocol):
    """A form whose inner products come from those of its factors, right ones and any left ones, one pair a position."""

    @property
    def right(self) -> Float[Array, "n rows groups T outputs"]:
        """The right factors."""

    def left_size(self, *, bias: bool) -> Float[Array, "n rows groups T 1"]:
        """The largest entries of left factors; with a ``bias``, of factors that end in one."""

    def squared(self) -> Float[Array, "n rows groups"]:
        """``|D|^2`` of every row, group by group."""

    def squares(self) -> Made:
        """The form whose gradients are the entrywise squares; exact if no entry has terms of two positions."""
