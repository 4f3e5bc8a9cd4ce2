"""Layers: a bias joined to its weight.

The gradient of a bias is the cotangent of its layer, summed over positions, and the cotangent is the right factor of the
weight's gradient: the bias is the weight of an input that is always one. A bias is joined to a weight only if this is proven.
The proof is that the bias's gradient and the right factor hold the entries of one value of the program, rearranged, with the
same axes kept and all others summed over. A scale, a repetition or another sum in between makes another value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxfisher._engine.forms import Product
from jaxfisher._engine.parts import Part


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
        source = parts[0].gradient if len(parts) == 1 else None
        if source is None or source.key not in known:
            continue
        k, is_right = known.pop(source.key)
        # A weight has at most one bias; a second one is stored by itself.
        if k not in weights:
            weights[b] = k
            turned[k] = leaves[k] if is_right else (_turned(leaves[k][0]),)
    return Layers(tuple(turned), tuple(weights))


def _weights(leaves: Sequence[tuple[Part, ...]]) -> dict[object, tuple[int, bool]]:
    """From each value that is a factor of a weight to the weight's index, and whether the value is its right factor."""
    found: dict[object, tuple[int, bool]] = {}
    for k, parts in enumerate(leaves):
        layout = parts[0].form.layout if len(parts) == 1 else None
        if layout is None or layout.groups != 1:
            continue
        for source, is_right in ((parts[0].left, False), (parts[0].right, True)):
            if source is not None:
                found.setdefault(source.key, (k, is_right))
    return found


def _turned(part: Part) -> Part:
    """A product with its factors swapped."""
    form = part.form
    assert isinstance(form, Product)
    turned = Product(form.right, form.left, form.layout.turned())
    return Part(turned, part.flags[::-1], part.place, part.right, part.left)
