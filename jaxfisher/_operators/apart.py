"""Views by layers in which each factor is inverted by one device of a mesh, which sends the result to all others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Scalar

from jaxfisher._bordered import Bordered
from jaxfisher._jobs_on_mesh import Devices, shared_out
from jaxfisher._operators.block import BlockDiagonal
from jaxfisher._operators.form import Form
from jaxfisher._operators.identity import Shifted
from jaxfisher._operators.inverted import Inverted
from jaxfisher._operators.kronecker import EigenKronecker, Kronecker
from jaxfisher._operators.side import eigenvectors, sides
from jaxfisher._operators.sum import Sum
from jaxfisher._pytree import array_fields
from jaxfisher._system import Factorise


@array_fields("blocks", repr=False)
class LayersApart(BlockDiagonal):
    """A `BlockDiagonal` in which each Kronecker factor is inverted by one device along an axis of a mesh."""

    devices: Devices

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the blocks; if some have factors, also that their solves are spread."""
        return (
            f"{super().name}, solves spread"
            if any(isinstance(bare(block), Kronecker) for block in self.blocks)
            else super().name
        )

    def factorised(self) -> LayersApart:
        """The same form with its Kronecker products held by eigenvectors."""
        products = [bare(block) for block in self.blocks]
        factors = [
            factor for part in products if isinstance(part, Kronecker) for factor in (part.input_side, Bordered(part.outputs))
        ]
        found = iter(made_of(self, eigenvectors, factors))
        return dataclasses.replace(self, blocks=tuple(_by_eigenvectors(block, found) for block in self.blocks))

    def inverse(self, damping: Scalar) -> Inverted:
        pairs = damped_blocks(self, damping)
        halves = [block.halves(at) if isinstance(block, Kronecker) else [] for block, at in pairs]
        found = iter(made_of(self, lambda half: sides(*half), [half for both in halves for half in both]))
        return self._inverse_of_blocks(
            [
                block.inverse_by(at, both, [next(found), next(found)]) if isinstance(block, Kronecker) else block.inverse(at)
                for (block, at), both in zip(pairs, halves, strict=True)
            ]
        )

    def inverses(self, largest: Scalar, factorise: Factorise) -> Callable[[Scalar], Inverted]:
        known = self.factorised().blocks
        at = [_inverses(block, by, largest, factorise) for block, by in zip(self.blocks, known, strict=True)]
        return lambda damping: self._inverse_of_blocks([inverse(damping) for inverse in at])


def factorised(form: Form) -> Form:
    """The same form with its Kronecker products held by eigenvectors, so that solves at any damping need products only."""
    # Leave the terms of a sum as they are, since a solve with the sum makes its matrix.
    return jax.tree.map(
        lambda part: part.factorised() if isinstance(part, Kronecker | LayersApart) else part,
        form,
        is_leaf=lambda part: isinstance(part, Kronecker | LayersApart | Sum),
    )


def devices_of(form: Form) -> Devices | None:
    """The devices over which the solves of a view by layers are spread; None if they are not spread."""
    whole = bare(form)
    return whole.devices if isinstance(whole, LayersApart) else None


def made_of(form: Form, make: Callable[[Any], Any], stacks: Sequence[Any]) -> list[Any]:
    """``make`` of each stack of a form's matrices, in one call for each size; spread over the form's devices, if it has any."""
    devices, all_of = devices_of(form), partial(together, make)
    if devices is None:
        return all_of(stacks)
    sizes = [jax.tree.leaves(stack)[0].shape for stack in stacks]
    return shared_out(all_of, stacks, [float(groups * m**3) for groups, m, _ in sizes], devices)


def together(make: Callable[[Any], Any], stacks: Sequence[Any]) -> list[Any]:
    """``make`` of each stack, with stacks of one size concatenated into one call."""
    shapes = [tuple(leaf.shape[1:] for leaf in jax.tree.leaves(stack)) for stack in stacks]
    made: dict[int, Any] = {}
    for shape in sorted(set(shapes)):
        places = [i for i, other in enumerate(shapes) if other == shape]
        ends = np.cumsum([len(jax.tree.leaves(stacks[i])[0]) for i in places])
        whole = make(jax.tree.map(lambda *parts: jnp.concatenate(parts), *(stacks[i] for i in places)))
        for i, start, end in zip(places, [0, *ends], ends, strict=False):
            made[i] = jax.tree.map(lambda x, start=start, end=end: x[start:end], whole)
    return [made[i] for i in range(len(stacks))]


def bare(form: Form) -> Form:
    """The form without a multiple of the identity that may be added to it."""
    return form.base if isinstance(form, Shifted) else form


def damped_blocks(form: Form, damping: Scalar) -> list[tuple[Form, Scalar]]:
    """The blocks without added multiples of the identity, each with its damping, to which these are added."""
    whole, shift = (form.base, form.shift) if isinstance(form, Shifted) else (form, 0)
    assert isinstance(whole, BlockDiagonal)
    pairs = [(block.base, block.shift) if isinstance(block, Shifted) else (block, 0) for block in whole.blocks]
    return [(block, damping + shift + own) for block, own in pairs]


def _by_eigenvectors(block: Form, found: Iterator[Any]) -> Form:
    """A block that is a Kronecker product by the next two eigendecompositions in ``found``; other blocks as they are."""
    if isinstance(block, Shifted):
        return dataclasses.replace(block, base=_by_eigenvectors(block.base, found))
    return block.by_eigenvectors(next(found), next(found)) if isinstance(block, Kronecker) else block


def _inverses(block: Form, known: Form, largest: Scalar, factorise: Factorise) -> Callable[[Scalar], Inverted]:
    """`Form.inverses` of a block; ``known`` is the same block by eigenvectors."""
    if isinstance(block, Shifted):
        base = _inverses(block.base, bare(known), largest + block.shift, factorise)
        return lambda damping: base(damping + block.shift)
    return partial(known.inverse_of, block) if isinstance(known, EigenKronecker) else block.inverses(largest, factorise)
