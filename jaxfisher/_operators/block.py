"""Block-diagonal Fishers: one block for each group of parameter leaves, each block in its own form."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Scalar

from jaxfisher._linalg import norm
from jaxfisher._operators.dense import by_entry
from jaxfisher._operators.diagonal import Diagonal
from jaxfisher._operators.form import Form
from jaxfisher._operators.inverted import Inverted
from jaxfisher._operators.operator import VIEW, Operator, View, as_operator, viewed
from jaxfisher._operators.sum import added
from jaxfisher._pytree import array_fields
from jaxfisher._system import Factorise, Solved
from jaxfisher._tree import ParamSpec, check_function, path_names


@array_fields("blocks", repr=False)
class BlockDiagonal(Form):
    """Forms over disjoint groups of leaves. ``members`` has the places of each group's leaves; a block's vectors are lists."""

    blocks: tuple[Form, ...]
    members: tuple[tuple[int, ...], ...]
    spec: ParamSpec

    @property
    def name(self) -> str:  # type: ignore[override]
        """The names of the blocks' forms, each with the number of blocks that have it."""
        counts = Counter(block.name for block in self.blocks)
        return "block-diagonal: " + ", ".join(f"{count} {name}" for name, count in counts.items())

    @property
    def averages(self) -> bool:  # type: ignore[override]
        """Whether every block averages."""
        return all(block.averages for block in self.blocks)

    @property
    def stack(self) -> tuple[int, ...]:
        return self.blocks[0].stack if self.blocks else ()

    def split(self, v: Any) -> list[list[Array]]:
        """The part of a vector that each block acts on."""
        leaves = jax.tree.leaves(v)
        return [[leaves[i] for i in group] for group in self.members]

    def join(self, parts: Sequence[list[Array]]) -> Any:
        """The vector made of these parts, one for each block."""
        places = [i for group in self.members for i in group]
        leaves = dict(zip(places, [leaf for part in parts for leaf in part], strict=True))
        return self.spec.tree([leaves[i] for i in range(len(places))])

    def as_matrix(self) -> Float[Array, "p p"]:
        matrix = jnp.zeros((self.spec.size, self.spec.size), self.spec.dtype)
        starts = [sum(self.spec.sizes[:i]) for i in range(len(self.spec.sizes))]
        for group, block in zip(self.members, self.blocks, strict=True):
            index = jnp.concatenate([starts[i] + jnp.arange(self.spec.sizes[i]) for i in group])
            matrix = matrix.at[jnp.ix_(index, index)].set(block.as_matrix())
        return matrix

    def diagonal(self) -> Any:
        return self.join([block.diagonal() for block in self.blocks])

    def product(self) -> Callable[[Any], Any]:
        products = [block.product() for block in self.blocks]
        return lambda v: self.join([product(part) for product, part in zip(products, self.split(v), strict=True)])

    def trace(self) -> Scalar:
        return _total([block.trace() for block in self.blocks])

    def eigvalsh(self) -> Float[Array, " p"]:
        return jnp.sort(jnp.concatenate([block.eigvalsh() for block in self.blocks]))

    def frobenius_norm(self) -> Scalar:
        return norm(jnp.stack([block.frobenius_norm() for block in self.blocks]))

    def rank(self) -> Int[Array, ""]:
        return _total([block.rank() for block in self.blocks])

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> BlockDiagonal:
        place = {old: new for new, old in enumerate(i for i, flag in enumerate(keep) if flag)}
        blocks, members = [], []
        for group, block in zip(self.members, self.blocks, strict=True):
            inside = tuple(keep[i] for i in group)
            if any(inside):
                blocks.append(block if all(inside) else block.restrict(inside, _listed(sum(inside))))
                members.append(tuple(place[i] for i in group if i in place))
        return dataclasses.replace(self, blocks=tuple(blocks), members=tuple(members), spec=self.spec.restrict(keep, treedef))

    def rescaled(self, factors: Sequence[Scalar]) -> BlockDiagonal:
        pairs = zip(self.members, self.blocks, strict=True)
        return self._with(block.rescaled([factors[i] for i in group]) for group, block in pairs)

    def with_unit_damping(self, dampings: Sequence[Scalar]) -> tuple[BlockDiagonal, tuple[Scalar, ...]]:
        pairs = zip(self.members, self.blocks, strict=True)
        made = [block.with_unit_damping([dampings[i] for i in group]) for group, block in pairs]
        places = [i for group in self.members for i in group]
        roots = dict(zip(places, [root for _, part in made for root in part], strict=True))
        return self._with(block for block, _ in made), tuple(roots[i] for i in range(len(places)))

    def scaled(self, factor: Scalar) -> BlockDiagonal:
        return self._with(block.scaled(factor) for block in self.blocks)

    def _with(self, blocks: Iterable[Form]) -> BlockDiagonal:
        return dataclasses.replace(self, blocks=tuple(blocks))

    def plus(self, other: Form) -> BlockDiagonal | None:
        if isinstance(other, Diagonal):
            other = BlockDiagonal(tuple(form_over(other, group) for group in self.members), self.members, self.spec)
        if not isinstance(other, BlockDiagonal) or other.members != self.members:
            return None
        return self._with(added(a, b) for a, b in zip(self.blocks, other.blocks, strict=True))

    def inner_products(self, vectors: Any) -> Float[Array, "k k"]:
        return _total([block.inner_products(part) for block, part in zip(self.blocks, self.split(vectors), strict=True)])

    def inverse(self, damping: Scalar) -> Inverted:
        return self._inverse_of_blocks([block.inverse(damping) for block in self.blocks])

    def inverses(self, largest: Scalar, factorise: Factorise) -> Callable[[Scalar], Inverted]:
        blocks = [block.inverses(largest, factorise) for block in self.blocks]
        return lambda damping: self._inverse_of_blocks([block(damping) for block in blocks])

    def _inverse_of_blocks(self, inverses: Sequence[Inverted]) -> Inverted:
        def apply(v: Any) -> Solved:
            solved = [inverse(part) for inverse, part in zip(inverses, self.split(v), strict=True)]
            x, rest = (self.join([getattr(part, name) for part in solved]) for name in ("x", "rest"))
            sound = jnp.all(jnp.stack([part.sound for part in solved]))
            return Solved(x, rest, _total([part.rank for part in solved]), sound)

        return apply

    def logdet(self, damping: Scalar) -> Scalar:
        return _total([block.logdet(damping) for block in self.blocks])

    def power_mv(self, v: Any, power: Scalar, damping: Scalar) -> Any:
        pairs = zip(self.blocks, self.split(v), strict=True)
        return self.join([block.power_mv(part, power, damping) for block, part in pairs])


@by_entry.register
def _(form: BlockDiagonal) -> BlockDiagonal:
    return dataclasses.replace(form, blocks=tuple(map(by_entry, form.blocks)))


def _total(parts: Sequence[Any]) -> Any:
    return sum(parts[1:], start=parts[0])


def _listed(count: int) -> Any:
    """The structure of a block's vectors."""
    return jax.tree.structure([0] * count)


def form_over(form: Form, group: Sequence[int]) -> Form:
    """The principal submatrix over some leaves, whose vectors are lists."""
    inside = set(group)
    return form.restrict(tuple(i in inside for i in range(len(form.spec.paths))), _listed(len(group)))


def part_of(fisher: Operator, group: Sequence[int]) -> Operator:
    """The operator with that principal submatrix."""
    return Operator(form_over(fisher.form, group), fisher.provenance)


def block_diagonal(fisher: Operator, groups: chex.ArrayTree | None = None, view: View | None = None) -> Operator:
    r"""The Fisher without the entries between groups of leaves.

    .. math:: F \approx \mathrm{diag}(F_1, \dots, F_k), \qquad F_b = \frac1n \sum_i s_{ib} s_{ib}^T.

    Each block is exact, and is held as F is. A block of a Fisher held as scores is held as scores too: a leaf of a million
    parameters needs no matrix of a million squared, since its solve goes through its n x n Gram matrix.

    Args:
        fisher: any operator.
        groups: a label for each leaf, as a pytree prefix of the parameters such as ``{"encoder": 0, "decoder": 1}`` or
            `jaxfisher.layers`. Leaves with equal labels share a block. None gives each leaf its own block.
        view: a view applied to each block, such as `jaxfisher.dense`; None leaves blocks as they are held.

    Returns:
        An operator of the same kind, held block-diagonal.

    Raises:
        TypeError: ``fisher`` is not an operator, or ``view`` returns something else.
        ValueError: ``groups`` is not a prefix of the parameters.

    Reference: Roux, Manzagol and Bengio, Topmoumoute online natural gradient algorithm (NeurIPS 2007), section 3.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(p["w"] * x + p["b"], 1.0)
    >>> F = jf.exact_fisher(model)({"w": 1.0, "b": 0.0}, jnp.array([1.0, 3.0]))
    >>> print(jf.block_diagonal(F).as_matrix())
    [[1. 0.]
     [0. 5.]]
    """
    fisher = viewed(fisher, "block_diagonal")
    if view is not None:
        check_function("view", view, VIEW)
    members = _members(fisher.spec, groups)
    parts = [part_of(fisher, group) for group in members]
    if view is not None:
        parts = [as_operator(view(part), "block_diagonal: `view`") for part in parts]
    return Operator(BlockDiagonal(tuple(part.form for part in parts), members, fisher.spec), fisher.provenance)


def _members(spec: ParamSpec, groups: chex.ArrayTree | None) -> tuple[tuple[int, ...], ...]:
    places = jax.tree.unflatten(spec.treedef, range(len(spec.paths)))
    if groups is None:
        return tuple((i,) for i in range(len(spec.paths)))
    labels: dict[int, Hashable] = {}
    try:
        jax.tree.map(lambda label, part: labels.update(dict.fromkeys(jax.tree.leaves(part), label)), groups, places)
        found: dict[Hashable, list[int]] = {}
        for i in range(len(spec.paths)):
            found.setdefault(labels[i], []).append(i)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"block_diagonal: `groups` has leaves at {', '.join(path_names(groups)) or 'no path'}, and is no prefix of the "
            f"parameters, whose first leaf is at {spec.paths[0]} ({error}). Give one hashable label, such as a "
            "string, for each leaf or subtree."
        ) from error
    return tuple(tuple(group) for group in found.values())
