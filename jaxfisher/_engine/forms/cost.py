"""The rule of cost: whether inner products of gradients are computed from those of their factors, and what that costs.

They are computed from factors if ``T^2 (I + O) <= I O``; otherwise gradients are formed tile by tile.

Reference: Bu, Mao and Xu, Scalable and efficient training of large convolutional neural networks with differential privacy
(NeurIPS 2022), section 4.
"""

from __future__ import annotations

from typing import cast

from jaxfisher._engine.forms.form import Factored
from jaxfisher._engine.forms.leaf import Leaf
from jaxfisher._engine.forms.lookup import Lookup
from jaxfisher._engine.forms.product import Product


def factors(leaf: Leaf) -> tuple[Factored, ...] | None:
    """The forms of a leaf if all of them hold factors in one layout; else None."""
    if all(isinstance(form, Product | Lookup) and form.layout == leaf.layout for form in leaf.forms):
        return cast("tuple[Factored, ...]", leaf.forms)
    return None


def inner_cost(leaf: Leaf) -> int:
    """The multiplications of one inner product by the factors, ``T^2 (I + O)``; one of formed gradients takes ``I O``."""
    # Inner products of one-hot rows are comparisons, which cost next to nothing. A side of length one costs nothing.
    lookups = all(isinstance(form, Lookup) for form in leaf.forms)
    sides = (leaf.layout.outputs,) if lookups else (leaf.layout.outputs, leaf.layout.inputs)
    return leaf.positions**2 * sum(side for side in sides if side > 1)


def by_factors(leaf: Leaf) -> bool:
    """The rule: whether inner products of a leaf's gradients come from those of their factors."""
    return factors(leaf) is not None and inner_cost(leaf) <= leaf.layout.inputs * leaf.layout.outputs


def forms_gradients(leaf: Leaf) -> bool:
    """Whether gradients have to be formed for inner products."""
    return not by_factors(leaf) and leaf.positions > 0


def working(leaf: Leaf) -> int:
    """How many numbers working with a leaf takes beside those that it stores: formed gradients and windows."""
    formed = leaf.examples * leaf.rows * leaf.size if forms_gradients(leaf) else 0
    return 2 * formed + leaf.examples * sum(form.making for form in leaf.forms)


def gram_flops(leaf: Leaf) -> int:
    """The floating point operations of a leaf's part of the Gram matrix; a multiplication and an addition count as two."""
    if not leaf.forms:
        return 0
    if by_factors(leaf):
        factored = [form.right for form in factors(leaf) or ()]
        factored += [form.left for form in leaf.forms if isinstance(form, Product)]
        return int(2 * sum(factor.size * factor.size // factor.shape[-1] for factor in factored))
    rows, size = leaf.examples * leaf.rows, leaf.layout.groups * leaf.layout.inputs * leaf.layout.outputs
    return int(2 * rows * rows * size + 2 * rows * leaf.positions * size)
