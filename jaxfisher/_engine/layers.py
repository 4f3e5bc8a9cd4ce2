"""Layers: a bias joined to its weight.

The gradient of a bias is the cotangent of its layer, summed over positions, and the cotangent is the right factor of the
weight's gradient: the bias is the weight of an input that is always one. A bias is joined to a weight only if this is proven.
The proof is that the bias's gradient and the right factor hold the entries of one value of the program, rearranged, with the
same axes kept and all others summed over, or of the same values if the layer is used several times. A scale, a repetition or
another sum in between makes another value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from jaxfisher._engine.forms import Product
from jaxfisher._engine.parts import Part, Sources


class Layers(NamedTuple):
    """The parts of all leaves, and for each leaf that is a bias the index of its weight among the leaves (None for others)."""

    leaves: tuple[tuple[Part, ...], ...]
    weights: tuple[int | None, ...]


def with_layers(leaves: Sequence[tuple[Part, ...]]) -> Layers:
    """Find the weight of every bias. A weight whose left factors are those of the outputs has its factors swapped."""
    known = _weights(leaves)
    turned = list(leaves)
    weights: list[int | None] = [None] * len(leaves)
    for b, parts in enumerate(leaves):
        owners = known.get(_key(part.gradient for part in parts), [])
        # A weight has at most one bias; a second one is that of another weight with these factors, or stored by itself.
        free = next(((k, is_right) for k, is_right in owners if k not in weights), None)
        if free is not None:
            weights[b], is_right = free
            turned[free[0]] = leaves[free[0]] if is_right else tuple(map(_turned, leaves[free[0]]))
    return Layers(tuple(turned), tuple(weights))


def _weights(leaves: Sequence[tuple[Part, ...]]) -> dict[Hashable, list[tuple[int, bool]]]:
    """From the values that are factors of a weight to the weight's index, and whether they are its right factors."""
    found: dict[Hashable, list[tuple[int, bool]]] = {}
    for k, parts in enumerate(leaves):
        if len({part.form.layout for part in parts}) != 1:
            continue
        for key, is_right in ((_key(part.left for part in parts), False), (_key(part.right for part in parts), True)):
            if key is not None:
                found.setdefault(key, []).append((k, is_right))
    return found


def _key(found: Iterable[Sources | None]) -> Hashable | None:
    """The sources of all parts of a leaf, in any order; None if a part has none, or if there is no part."""
    known = list(found)
    keys = Counter(source.key for sources in known for source in sources or ())
    return frozenset(keys.items()) if known and all(known) else None


def _turned(part: Part) -> Part:
    """A product with its factors swapped."""
    form = part.form
    assert isinstance(form, Product)
    turned = Product(form.right, form.left, form.layout.turned())
    return Part(turned, part.flags[::-1], part.place, part.right, part.left)
