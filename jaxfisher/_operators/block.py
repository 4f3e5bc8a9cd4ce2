"""A Fisher with entries between groups of parameter leaves dropped: one operator a group, each in a form of its own."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Scalar

from jaxfisher._inverse import Factorise
from jaxfisher._linalg import norm
from jaxfisher._operators.base import VIEW, Operator, View, as_operator
from jaxfisher._operators.damping import Dampings
from jaxfisher._operators.diagonal import Diagonal
from jaxfisher._operators.inverted import Inverted
from jaxfisher._operators.provenance import Provenance
from jaxfisher._system import Solved
from jaxfisher._tree import ParamSpec, check_function, path_names


@partial(jax.tree_util.register_dataclass, data_fields=("blocks",), meta_fields=("members", "spec", "provenance"))
@dataclasses.dataclass(frozen=True, repr=False)
class BlockDiagonal(Operator):
    """Operators over disjoint groups of leaves. ``members`` has the places of each group's leaves; its vectors are lists."""

    blocks: tuple[Operator, ...]
    members: tuple[tuple[int, ...], ...]
    spec: ParamSpec
    provenance: Provenance

    @property
    def form(self) -> str:  # type: ignore[override]
        """The forms of the blocks, and how many have each."""
        counts = Counter(block.form for block in self.blocks)
        return "block-diagonal: " + ", ".join(f"{count} {form}" for form, count in counts.items())

    @property
    def averages(self) -> bool:  # type: ignore[override]
        """Whether every block averages."""
        return all(block.averages for block in self.blocks)

    @property
    def arrays(self) -> tuple[Any, ...]:
        return tuple(block.arrays for block in self.blocks)

    def with_arrays(self, arrays: tuple[Any, ...]) -> BlockDiagonal:
        return self._with(block.with_arrays(part) for block, part in zip(self.blocks, arrays, strict=True))

    @property
    def viewed(self) -> BlockDiagonal:
        return self._with(block.viewed for block in self.blocks)

    def pieces(self) -> tuple[tuple[tuple[int, ...], Operator], ...]:
        parts = [(group, piece) for group, block in zip(self.members, self.blocks, strict=True) for piece in block.pieces()]
        return tuple((tuple(group[i] for i in places), operator) for group, (places, operator) in parts)

    def factorised(self) -> BlockDiagonal:
        return self._with(block.factorised() for block in self.blocks)

    def _split(self, v: Any) -> list[list[Array]]:
        leaves = jax.tree.leaves(v)
        return [[leaves[i] for i in group] for group in self.members]

    def _join(self, parts: Sequence[list[Array]]) -> Any:
        places = [i for group in self.members for i in group]
        leaves = dict(zip(places, [leaf for part in parts for leaf in part], strict=True))
        return self.spec.tree([leaves[i] for i in range(len(places))])

    def _each(self, function: Callable[[Operator], list[Array]]) -> Any:
        return self._join([function(block) for block in self.blocks])

    @property
    def stack(self) -> tuple[int, ...]:
        return self.blocks[0].stack if self.blocks else ()

    def as_matrix(self) -> Float[Array, "p p"]:
        matrix = jnp.zeros((self.size, self.size), self.spec.dtype)
        starts = [sum(self.spec.sizes[:i]) for i in range(len(self.spec.sizes))]
        for group, block in zip(self.members, self.blocks, strict=True):
            index = jnp.concatenate([starts[i] + jnp.arange(self.spec.sizes[i]) for i in group])
            matrix = matrix.at[jnp.ix_(index, index)].set(block.as_matrix())
        return matrix

    def diagonal(self) -> Any:
        return self._each(lambda block: block.diagonal())

    def linearised(self) -> Callable[[Any], Any]:
        products = [block.linearised() for block in self.blocks]
        return lambda v: self._join([product(part) for product, part in zip(products, self._split(v), strict=True)])

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
        return BlockDiagonal(tuple(blocks), tuple(members), self.spec.restrict(keep, treedef), self.provenance)

    def rescaled(self, factors: Sequence[Scalar]) -> BlockDiagonal:
        pairs = zip(self.members, self.blocks, strict=True)
        return self._with(block.rescaled([factors[i] for i in group]) for group, block in pairs)

    def _scaled(self, factor: Any) -> BlockDiagonal:
        return dataclasses.replace(
            self, blocks=tuple(block._scaled(factor) for block in self.blocks), provenance=self.provenance.times()
        )

    def _with(self, blocks: Any) -> BlockDiagonal:
        return dataclasses.replace(self, blocks=tuple(blocks))

    def _plus(self, other: Operator) -> Operator:
        if isinstance(other, Diagonal):
            other = _grouped(other, self.members, lambda part: part)
        if not isinstance(other, BlockDiagonal) or other.members != self.members:
            return super()._plus(other)
        blocks = tuple(a + b for a, b in zip(self.blocks, other.blocks, strict=True))
        return BlockDiagonal(blocks, self.members, self.spec, self.provenance.plus(other.provenance))

    def _quadratic(self, v: Any) -> Scalar:
        return _total([block._quadratic(part) for block, part in zip(self.blocks, self._split(v), strict=True)])

    def _inverse(self, damping: Scalar) -> Inverted:
        return self._inverse_of_blocks([block._inverse(damping) for block in self.blocks])

    def inverses(self, largest: Scalar, factorise: Factorise) -> Callable[[Scalar], Inverted]:
        blocks = [block.inverses(largest, factorise) for block in self.blocks]
        return lambda damping: self._inverse_of_blocks([block(damping) for block in blocks])

    def _inverse_by_leaf(self, dampings: tuple[Scalar, ...]) -> Inverted:
        pairs = zip(self.blocks, self._by_group(dampings), strict=True)
        return self._inverse_of_blocks([block.inverse(part) for block, part in pairs])

    def _inverse_of_blocks(self, inverses: Sequence[Inverted]) -> Inverted:
        def apply(v: Any) -> Solved:
            solved = [inverse(part) for inverse, part in zip(inverses, self._split(v), strict=True)]
            x, rest = (self._join([getattr(part, name) for part in solved]) for name in ("x", "rest"))
            sound = jnp.all(jnp.stack([part.sound for part in solved]))
            return Solved(x, rest, _total([part.rank for part in solved]), sound)

        return apply

    def _logdet(self, damping: Scalar) -> Scalar:
        return _total([block._logdet(damping) for block in self.blocks])

    def _logdet_by_leaf(self, dampings: tuple[Scalar, ...]) -> Scalar:
        pairs = zip(self.blocks, self._by_group(dampings), strict=True)
        return _total(
            [block._logdet_by_leaf(part) if isinstance(part, tuple) else block._logdet(part) for block, part in pairs]
        )

    def _by_group(self, dampings: tuple[Scalar, ...]) -> list[Dampings]:
        return [dampings[group[0]] if len(group) == 1 else tuple(dampings[i] for i in group) for group in self.members]

    def _power_mv(self, v: Any, power: Scalar, damping: Scalar) -> Any:
        pairs = zip(self.blocks, self._split(v), strict=True)
        return self._join([block._power_mv(part, power, damping) for block, part in pairs])


def _total(parts: Sequence[Any]) -> Any:
    return sum(parts[1:], start=parts[0])


def _listed(count: int) -> Any:
    """The structure of a block's vectors."""
    return jax.tree.structure([0] * count)


def part_of(fisher: Operator, group: Sequence[int]) -> Operator:
    """The principal sub-operator over some leaves, for vectors that are lists."""
    inside = set(group)
    return fisher.restrict(tuple(i in inside for i in range(len(fisher.spec.paths))), _listed(len(group)))


def _grouped(fisher: Operator, members: tuple[tuple[int, ...], ...], view: View) -> BlockDiagonal:
    blocks = tuple(view(part_of(fisher, group)) for group in members)
    return BlockDiagonal(blocks, members, fisher.spec, fisher.provenance)


def block_diagonal(fisher: Operator, groups: chex.ArrayTree | None = None, view: View | None = None) -> BlockDiagonal:
    r"""The Fisher with entries between groups of leaves dropped.

    .. math:: F \approx \mathrm{diag}(F_1, \dots, F_k), \qquad F_b = \frac1n \sum_i s_{ib} s_{ib}^T.

    Each block is exact. It is held as F is: blocks of scores are scores, so that a leaf of a million parameters takes no matrix
    of a million squared, and is solved through its n x n Gram matrix.

    Args:
        fisher: any operator.
        groups: a label for each leaf: a pytree prefix of the parameters, as ``{"encoder": 0, "decoder": 1}``, or
            `jaxfisher.layers`; leaves with equal labels share a block. None for a block a leaf.
        view: applied to each block, as `jaxfisher.dense`; None leaves it as it is held.

    Returns:
        A block-diagonal operator of the same kind.

    Raises:
        TypeError: ``fisher`` is not an operator, or ``view`` returns none.
        ValueError: ``groups`` is not a prefix of the parameters.

    Reference: Roux, Manzagol and Bengio, Topmoumoute online natural gradient algorithm (NeurIPS 2007), section 3.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(p["w"] * x + p["b"], 1.0)
    >>> F = jf.exact_fisher(model)({"w": 1.0, "b": 0.0}, jnp.array([1.0, 3.0]))
    >>> print(jf.block_diagonal(F).as_matrix())
    [[1. 0.]
     [0. 5.]]
    """
    fisher = as_operator(fisher, "block_diagonal").viewed
    if view is not None:
        check_function("view", view, VIEW)
    checked = (lambda part: part) if view is None else (lambda part: as_operator(view(part), "block_diagonal: `view`"))
    return _grouped(fisher, _members(fisher.spec, groups), checked)


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
