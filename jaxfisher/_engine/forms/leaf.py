"""One parameter leaf: its gradients for all rows, as the sum of their forms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Scalar

from jaxfisher._engine.forms.arrays import Seal, few, masked, taken, total
from jaxfisher._engine.forms.form import Form, Made
from jaxfisher._engine.forms.formed import Formed
from jaxfisher._engine.forms.layout import Layout, plain_layout
from jaxfisher._engine.forms.product import Product
from jaxfisher._pieces import map_batches, sum_batches
from jaxfisher._pytree import array_fields


@array_fields("forms")
class Leaf:
    """The gradients of one parameter leaf for ``examples x rows`` rows: the sum of its forms, which is zero without a form.

    ``why`` says why a gradient was formed although that takes more memory than its factors would. A bias whose gradient is the
    right factor of a weight, summed over positions, is the weight of an input that is always one: ``layer`` of the bias is the
    weight's index among the leaves, and ``bias`` of the weight is true. Inner products of both are then computed from the
    weight's factors, and the layer's Kronecker moments are those of the inputs with a last entry of one.
    """

    forms: tuple[Form, ...]
    shape: tuple[int, ...]
    dtype: Any
    examples: int
    rows: int
    why: str | None = None
    layer: int | None = None
    bias: bool = False

    @property
    def layout(self) -> Layout:
        """The layout that all forms with a layout share; the layout of a column if they differ, or if none has one."""
        layouts = {form.layout for form in self.forms if form.layout is not None}
        return layouts.pop() if len(layouts) == 1 else plain_layout(self.shape)

    @property
    def positions(self) -> int:
        """The number T of outer products whose sum a row is."""
        return sum(form.positions for form in self.forms)

    @property
    def made(self) -> tuple[Made, ...]:
        """The forms with their factors computed."""
        return tuple(form.made() for form in self.forms)

    def mv(self, v: Float[Array, "*shape"], seal: Seal, bias: Array | None = None) -> Float[Array, "examples rows"]:
        """``D . V`` for every row; with a vector for the bias of the layer, the product with both."""
        if not self.forms:
            return jnp.zeros((self.examples, self.rows), self.dtype)

        def product(leaf: Leaf) -> Array:
            if bias is None:
                parts = [form.mv(v, seal) for form in leaf.made]
            else:
                last = bias.reshape(1, 1, self.layout.groups, 1, -1)
                parts = [form.mv(v, seal, last) for form in leaf.made if isinstance(form, Product)]
            return jnp.broadcast_to(total(parts), (leaf.examples, leaf.rows))

        return self.in_pieces(product, map_batches)

    def rmv(self, w: Float[Array, "examples rows"]) -> Float[Array, "*shape"]:
        """``sum_rows w D``."""
        if not self.forms:
            return jnp.zeros(self.shape, self.dtype)
        return self.in_pieces(lambda leaf, w: total([form.rmv(w) for form in leaf.made]), sum_batches, w)

    def gradient(self) -> Float[Array, "examples rows *shape"]:
        """The gradients themselves."""
        if not self.forms:
            return jnp.zeros((self.examples, self.rows, *self.shape), self.dtype)

        def formed(leaf: Leaf) -> Array:
            return jnp.broadcast_to(total([form.gradient() for form in leaf.made]), (leaf.examples, leaf.rows, *self.shape))

        return self.in_pieces(formed, map_batches)

    def in_pieces(self, function: Callable[..., Any], gather: Callable[..., Any], *given: Array) -> Any:
        """Call ``function`` on the leaf with its factors computed, and on the ``given`` arrays, which have a row per example.

        It is called on all examples at once, or on as many at a time as the windows of convolutions allow; ``gather`` then
        combines the results.
        """
        flat, treedef = jax.tree.flatten(self.forms)
        varying = [array.shape[0] == self.examples for array in flat]

        def piece(*data: Array) -> Any:
            mine, rest = iter(data), iter(array for array, flag in zip(flat, varying, strict=True) if not flag)
            forms = jax.tree.unflatten(treedef, [next(mine) if flag else next(rest) for flag in varying])
            examples = data[0].shape[0] if data else self.examples
            made = tuple(form.made() for form in forms)
            return function(dataclasses.replace(self, forms=made, examples=examples), *mine)

        data = (*(array for array, flag in zip(flat, varying, strict=True) if flag), *given)
        making = sum(form.making for form in self.forms)
        return gather(piece, data, few(making) if making else None)

    def sliceable(self) -> Leaf:
        """The leaf with forms that can give columns in its layout. Other forms are replaced by formed gradients.

        The gradients of a convolution's kernel are smaller than its windows, which are computed for some examples at a time.
        """
        if any(form.making for form in self.forms):
            return self.formed()
        forms = tuple(form if form.layout in (None, self.layout) else Formed(form.made().gradient()) for form in self.forms)
        return dataclasses.replace(self, forms=forms)

    def formed(self) -> Leaf:
        """The leaf with its gradients formed."""
        return dataclasses.replace(self, forms=(Formed(self.gradient()),))

    def beside(self, weight: Leaf) -> Leaf:
        """The bias of a layer, made of the right factors of its weight if these are its gradients; else the leaf itself.

        Otherwise a program would hold one array twice, in two shapes, and copy it on its way into a loop.
        """
        form = weight.forms[0]
        if weight.positions > 1 or not isinstance(form, Product):
            return self
        return dataclasses.replace(self, forms=(Formed(form.right.reshape(*form.right.shape[:2], *self.shape)),))

    def sizes(self) -> Float[Array, "n rows"]:
        """A bound on the entries of ``D`` of each row and of the layer's bias, of their order of magnitude.

        An axis has length one if the rows do not differ along it.
        """
        if not self.forms:
            return jnp.zeros((1, 1), self.dtype)
        whole: Array = total([form.sizes(bias=self.bias) for form in self.forms])
        return whole

    def means(self, w: Float[Array, "examples rows"], kinds: int = 1) -> tuple[tuple[Array, ...], ...]:
        """The weighted means of the arrays of every form, for `shifted`.

        They are over all rows, or, if the rows of an example are of several ``kinds``, over examples for each row.
        """
        return tuple(form.means(w, kinds > 1) for form in self.forms)

    def shifted(self, means: tuple[tuple[Array, ...], ...]) -> Leaf:
        """The gradients less a constant, which is near their mean if ``means`` are those of `means`."""
        forms = [part for form, mean in zip(self.forms, means, strict=True) for part in form.shifted(mean)]
        return dataclasses.replace(self, forms=tuple(forms), layer=None, bias=False)

    def times(self, factor: Scalar) -> Leaf:
        """The gradients times a number, without the link between a weight and its bias."""
        forms = tuple(form.changed(lambda array: array * factor) for form in self.forms)
        return dataclasses.replace(self, forms=forms, layer=None, bias=False)

    def rows_times(self, factors: Float[Array, "n rows"]) -> Leaf:
        """The gradients of each row times that row's factor; rows along an axis of length one share theirs."""

        def scaled(array: Array) -> Array:
            return array * factors.reshape(*factors.shape, *(1,) * (array.ndim - 2))

        return dataclasses.replace(self, forms=tuple(form.changed(scaled) for form in self.forms))

    def masked(self, live: Bool[Array, " examples"]) -> Leaf:
        """The same gradients, exactly zero for the examples that are not live."""
        # The right factors are set to zero, since the right factor of a layer's weight is the gradient of its bias as well.
        return dataclasses.replace(self, forms=tuple(form.changed(lambda array: masked(array, live)) for form in self.forms))

    def take(self, examples: slice) -> Leaf:
        """The rows of some examples."""
        count = len(range(*examples.indices(self.examples)))
        return dataclasses.replace(self, forms=taken(self.forms, examples, self.examples), examples=count)

    @property
    def bytes(self) -> int:
        """The bytes of the arrays that the forms store."""
        return int(sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(self.forms)))

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)


def leaf_of(values: Float[Array, "examples *shape"]) -> Leaf:
    """A leaf whose gradients are these vectors, one row per example."""
    return Leaf((Formed(values[:, None]),), values.shape[1:], values.dtype, values.shape[0], 1)
