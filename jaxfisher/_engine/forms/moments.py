"""Second moments of the factors of a leaf: what its Kronecker approximations are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxfisher._engine.forms.arrays import contracted, sum_to
from jaxfisher._engine.forms.layout import Layout
from jaxfisher._engine.forms.leaf import Leaf
from jaxfisher._engine.forms.product import Product
from jaxfisher._examples import sum_batches


class Moments(NamedTuple):
    """Second moments of the factors of a leaf, the statistics of its Kronecker approximation.

    ``inputs (x) outputs`` approximates the leaf's block of ``S^T diag(omega) S``, in the order of ``layout``. Where the leaf
    has a bias, the last input is the one it is the weight of, and the block is that of the layer.
    """

    inputs: Float[Array, "groups inputs inputs"]
    outputs: Float[Array, "groups outputs outputs"]
    layout: Layout


def has_moments(leaf: Leaf) -> bool:
    """Whether a leaf is a sum of products in one layout, whose factors' second moments are a Kronecker approximation."""
    return bool(leaf.forms) and all(not form.unfactored and form.layout == leaf.layout for form in leaf.forms)


def expanded_moments(leaf: Leaf, w: Float[Array, "examples rows"]) -> Moments | None:
    """Kronecker moments with positions as if they were examples: ``E[1/T sum_t a_t a_t^T]`` and ``E[sum_t g_t g_t^T]``.

    None for a leaf that is no dense outer product. Reference: Eschenhagen et al. (NeurIPS 2023), KFAC-expand.
    """

    def of(left: Array, right: Array, w: Array) -> tuple[Array, Array]:
        mean = jnp.mean(w, 1, keepdims=True) / left.shape[3]
        return _second_moment(left, mean if left.shape[1] == 1 else w / w.shape[1] / left.shape[3]), _second_moment(right, w)

    return _moments(leaf, w, of)


def reduced_moments(leaf: Leaf, w: Float[Array, "examples rows"]) -> Moments | None:
    """Kronecker moments of sums over positions: ``E[a a^T]`` of ``a = mean_t a_t`` and ``E[g g^T]`` of ``g = sum_t g_t``.

    None for a leaf that is no dense outer product. Reference: Eschenhagen et al. (NeurIPS 2023), KFAC-reduce.
    """

    def of(left: Array, right: Array, w: Array) -> tuple[Array, Array]:
        left, right = jnp.mean(left, 3, keepdims=True), jnp.sum(right, 3, keepdims=True)
        mean = jnp.mean(w, 1, keepdims=True)
        return _second_moment(left, mean if left.shape[1] == 1 else w / w.shape[1]), _second_moment(right, w)

    return _moments(leaf, w, of)


def _moments(
    leaf: Leaf, w: Float[Array, "examples rows"], of: Callable[[Array, Array, Array], tuple[Array, Array]]
) -> Moments | None:
    if not has_moments(leaf):
        return None

    def piece(leaf: Leaf, w: Array) -> tuple[Array, Array]:
        pairs = [(product.left, product.right) for product in products(leaf)]
        return of(_joined([left for left, _ in pairs]), _joined([right for _, right in pairs]), w)

    inputs, outputs = leaf.in_pieces(piece, sum_batches, w)
    return Moments(inputs, outputs, leaf.layout)


def products(leaf: Leaf) -> list[Product]:
    """The forms of a leaf; with a bias, each left factor has at its end the one that the bias is the weight of."""
    found = [form for form in leaf.made if isinstance(form, Product)]
    if not leaf.bias:
        return found
    ones = [jnp.ones((*product.left.shape[:-1], 1), product.left.dtype) for product in found]
    return [
        dataclasses.replace(product, left=jnp.concatenate([product.left, one], -1))
        for product, one in zip(found, ones, strict=True)
    ]


def _joined(factors: Sequence[Array]) -> Float[Array, "n r b t i"]:
    """The factors of several products as those of more positions."""
    lead: tuple[int, ...] = jnp.broadcast_shapes(*(x.shape[:2] for x in factors))
    return jnp.concatenate([jnp.broadcast_to(x, (*lead, *x.shape[2:])) for x in factors], axis=3)


def _second_moment(x: Float[Array, "n r b t i"], w: Float[Array, "n r"]) -> Float[Array, "b i i"]:
    """``sum w x x^T`` over rows and positions, symmetric up to rounding: to mirror it would take as long as to make it."""
    w = sum_to(w, x.shape[:2])[:, :, None, None, None]
    return contracted(*jnp.broadcast_arrays(w * x, x))
