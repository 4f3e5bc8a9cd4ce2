r"""The layer-wise views KFAC and EKFAC, of one operator or of a sum of operators in any forms.

A layer's score is ``sum_t a_t (x) g_t`` (inputs, output cotangents, over the positions that share the weight). KFAC replaces
the mean of products by the product of means.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Scalar

from jaxfisher._engine import Moments
from jaxfisher._once import once
from jaxfisher._operators.block import BlockDiagonal, form_over, part_of
from jaxfisher._operators.diagonal import Diagonal, diagonal
from jaxfisher._operators.form import Form
from jaxfisher._operators.identity import ScaledIdentity, Shifted
from jaxfisher._operators.kronecker import EigenKronecker, Kronecker, merged
from jaxfisher._operators.operator import VIEW, Operator, View, as_operator, scores_of, viewed
from jaxfisher._operators.sum import added
from jaxfisher._operators.terms import Places, terms_of
from jaxfisher._scores import FactoredScores
from jaxfisher._tree import ParamSpec, check_function


class Sharing(NamedTuple):
    """A way to count the positions that share a weight: its name, and the moments of the factors that follow from it."""

    name: str
    moments: Callable[[FactoredScores], Sequence[Moments | None]]


EXPAND = Sharing("expand", lambda scores: scores.expanded_moments())
REDUCE = Sharing("reduce", lambda scores: scores.reduced_moments())


def kronecker(fisher: Operator, rest: View = diagonal) -> Operator:
    r"""KFAC with positions treated like examples (*expand*): the block of each layer as a Kronecker product.

    .. math:: F_\ell \approx A \otimes G, \qquad A = \frac{E \sum_t a_t a_t^T}{E \sum_t 1}, \quad
        G = c\, E\Big[\sum_t g_t g_t^T\Big], \quad \mathrm{tr} A\, \mathrm{tr} G = \mathrm{tr} F_\ell,

    with ``a`` a layer's inputs (with a last one for its bias), ``g`` the derivatives of the log-density by its outputs, and t
    the positions that share the weight and carry a gradient. A position at which every ``g`` is zero, such as padding that a
    mask takes out of the loss, is not counted. E is the Fisher's mean over examples, and over outputs or draws. The factor c
    makes the traces agree. If every position carries a gradient, these are the factors of Eschenhagen et al., who have c = 1.
    The view is exact for one example of a layer without sharing, and for deep linear networks with Gaussian outputs. It works
    in any framework, since layers are read off the program.

    **The view of a sum** ``F + G`` goes leaf by leaf. A multiple of the identity stays one. If a leaf has factors in one term
    only, those are taken. If it has factors in several terms, the block is one product, whose factors are means over the terms,
    each weighted by the trace of its other factor. So it has the trace of the sum on every layer, and equals the sum of the
    terms' products if that sum is one product. A term in which such a leaf has no factors contributes its diagonal. Factors in
    different layouts, as of weights that are a stack in one term and one matrix in the other, stay a sum, which is solved as a
    dense block. Leaves that have factors in no term are viewed by ``rest``.

    Args:
        fisher: an operator held as scores, implicit, held by Kronecker factors, or a sum with one of these.
        rest: the view of the leaves that enter no dense product (scales, tables, lone biases): `jaxfisher.diagonal`, or
            `jaxfisher.block_diagonal` for one exact block a leaf. The `repr` counts these leaves, and `jaxfisher.explain` says
            why each has no factors.

    Returns:
        A block-diagonal operator, with one block a layer. Its running mean averages the factors.

    Raises:
        TypeError: no term of ``fisher`` is held as scores or by factors, or the scores are centred, whose covariance is no sum
            of Kronecker products.

    Reference: Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature (ICML 2015),
    section 3; Eschenhagen et al., Kronecker-factored approximate curvature for modern neural network architectures (NeurIPS
    2023), section 3.2.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(x @ p["w"] + p["b"], jnp.ones(2))
    >>> F = jf.exact_fisher(model)({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, jnp.ones((4, 3)))
    >>> jf.kronecker(F)
    Fisher(exact, mean over 4, params 8, block-diagonal: 1 Kronecker (expand))
    """
    return _layered(viewed(fisher, "kronecker"), EXPAND, rest, "kronecker")


def kronecker_reduce(fisher: Operator, rest: View = diagonal) -> Operator:
    r"""KFAC with a layer's positions taken together (*reduce*), for weights shared over positions that are then averaged.

    .. math:: A = E[\bar a \bar a^T], \quad \bar a = \tfrac1T \sum_t a_t, \qquad
        G = c\, E[\bar g \bar g^T], \quad \bar g = \sum_t g_t, \qquad \mathrm{tr} A\, \mathrm{tr} G = \mathrm{tr} F_\ell,

    over the T positions of an example that carry a gradient, and over the examples that have one.

    Arguments and errors are those of `jaxfisher.kronecker`, with which it agrees for weights that are not shared.

    Reference: Eschenhagen et al. (NeurIPS 2023), section 3.3.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(jnp.mean(x @ p["w"], 0), jnp.ones(2))
    >>> F = jf.exact_fisher(model)({"w": jnp.ones((3, 2))}, jnp.ones((4, 5, 3)))
    >>> jf.kronecker_reduce(F)
    Fisher(exact, mean over 4, params 6, block-diagonal: 1 Kronecker (reduce))
    """
    return _layered(viewed(fisher, "kronecker_reduce"), REDUCE, rest, "kronecker_reduce")


def eigen_kronecker(fisher: Operator, basis: Operator | None = None, rest: View = diagonal) -> Operator:
    r"""EKFAC: the eigenbasis of KFAC with the exact second moments along it as eigenvalues, from the same scores.

    .. math:: F_\ell \approx (Q_A \otimes Q_G)\, \mathrm{diag}(\lambda)\, (Q_A \otimes Q_G)^T, \qquad
        \lambda = E\big[(Q_A^T D\, Q_G)^2\big],

    where D is the score of the layer. Of all diagonals in that basis it is the one nearest to the block in Frobenius norm, so
    never farther than KFAC. For a sum it is the sum of the terms' values in one basis, whatever the forms of the terms, in the
    layout of the first term that has factors.

    **When it has no derivative.** Where a factor has equal eigenvalues other than zero, its eigenbasis is not unique, and the
    view depends on the choice. Derivatives are then those for a basis that does not turn between these eigenvectors.

    Args:
        fisher: an operator as in `jaxfisher.kronecker`; with a ``basis`` any operator, also one of centred scores.
        basis: a `jaxfisher.kronecker` or `jaxfisher.eigen_kronecker` view, perhaps an older one, whose eigenvectors are used;
            None takes the eigenvectors of `jaxfisher.kronecker` of ``fisher``.
        rest: as in `jaxfisher.kronecker`.

    Returns:
        A block-diagonal operator, with one block a layer. It has no running mean, since bases differ from batch to batch.

    Raises:
        TypeError: without a ``basis``, as in `jaxfisher.kronecker`; else ``basis`` is no Kronecker view.
        ValueError: ``basis`` is over other parameters.

    Reference: George et al., Fast approximate natural gradient descent in a Kronecker-factored eigenbasis (NeurIPS 2018),
    section 3.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(x @ p["w"] + p["b"], jnp.ones(2))
    >>> F = jf.exact_fisher(model)({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, jnp.ones((4, 3)))
    >>> jf.eigen_kronecker(F)
    Fisher(exact, mean over 4, params 8, block-diagonal: 1 eigen-Kronecker)
    """
    fisher = viewed(fisher, "eigen_kronecker")
    if basis is None:
        basis = _layered(fisher, EXPAND, rest, "eigen_kronecker")
    if not isinstance(basis, Operator) or not isinstance(basis.form, BlockDiagonal):
        raise TypeError(f"eigen_kronecker: `basis` is {basis!r}; expected jf.kronecker(fisher) or jf.eigen_kronecker(fisher).")
    fisher.spec.check_same(basis.spec, f"eigen_kronecker: cannot view {fisher} in `basis`, {basis}")
    pieces = [_Term(places, form, ()) for places, form in terms_of(fisher.form)]
    blocks: list[Form] = []
    members: list[Places] = []
    for group, block in _bases(basis.form):
        values = [
            piece.part(inside).along(block.basis_over([group.index(place) for place in inside]))
            for piece in pieces
            for inside in [tuple(place for place in group if place in piece.places)]
            if inside
        ]
        total = functools.reduce(jnp.add, values)
        blocks.append(dataclasses.replace(block, values=total, separable=False, spec=_spec_of(fisher.spec, group)))
        members.append(group)
    return _with_rest(fisher, blocks, members, rest)


def _bases(view: Form) -> list[tuple[Places, EigenKronecker]]:
    """The eigenvectors of a view's layers; for a layer with several products in different layouts, those of the first."""
    found: list[tuple[Places, EigenKronecker]] = []
    for places, form in terms_of(view):
        taken = {place for group, _ in found for place in group}
        if isinstance(form, Kronecker | EigenKronecker) and taken.isdisjoint(places):
            found.append((places, form.factorised() if isinstance(form, Kronecker) else form))
    return found


def layers(fisher: Operator) -> Any:
    """Labels that group each bias with the weight of its layer: ``groups=jf.layers(F)`` in `jaxfisher.block_diagonal`.

    A bias belongs to a weight if the gradient of the bias is the output factor of the weight's gradient. This is read off the
    program of the scores, whatever the parameters are called. In a sum it is enough that this holds in one of the terms.

    Args:
        fisher: an operator held as scores, implicit, held by Kronecker factors, or a sum with one of these.

    Returns:
        A pytree like the parameters. The label of a leaf is the path of its layer's weight, or its own path if it has none.

    Raises:
        TypeError: no term of ``fisher`` is held as scores or by factors.

    Reference: Martens and Grosse (ICML 2015), section 2.1, for the homogeneous coordinate that makes a bias part of its weight.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda p, x: jf.Normal(x @ p["w"] + p["b"], jnp.ones(2))
    >>> F = jf.exact_fisher(model)({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, jnp.ones((4, 3)))
    >>> jf.layers(F)
    {'b': "['w']", 'w': "['w']"}
    """
    fisher = viewed(fisher, "layers")
    known = [(places, _joins(form)) for places, form in terms_of(fisher.form)]
    if all(joins is None for _, joins in known):
        scores_of(fisher, "layers")
    weights = {tuple(places[i] for i in group): places[weight] for places, joins in known for group, weight in joins or ()}
    owners = list(range(len(fisher.spec.paths)))
    for members in _connected(weights):
        first = next(weight for group, weight in weights.items() if group[0] in members)
        for place in members:
            owners[place] = first
    return fisher.spec.tree([fisher.spec.paths[owner] for owner in owners])  # type: ignore[misc]


def _joins(form: Form) -> list[tuple[Places, int]] | None:
    """The leaves of each layer with a bias, and which of them is the weight; None for a form that knows nothing of layers."""
    if isinstance(form, Kronecker | EigenKronecker):
        return [(tuple(range(len(form.spec.paths))), form.weight)]
    scores = form.as_scores()
    if scores is None:
        return None
    roles = scores.roles if isinstance(scores, FactoredScores) else ()
    owners = [(k, role.layer) for k, role in enumerate(roles) if role.layer is not None]
    return [((min(k, owner), max(k, owner)), owner) for k, owner in owners]


@dataclasses.dataclass(frozen=True)
class _Term:
    """One term of the operator that a view is taken of: the places of its leaves, and its layers that have factors."""

    places: Places
    form: Form
    layers: tuple[tuple[Places, Kronecker], ...]

    @functools.cached_property
    def loose(self) -> Places:
        """The leaves that the term depends on and that have no factors in it."""
        scores = self.form.as_scores()
        touched = [role.touched for role in scores.roles] if isinstance(scores, FactoredScores) else [True] * len(self.places)
        inside = {place for group, _ in self.layers for place in group}
        return tuple(place for place, flag in zip(self.places, touched, strict=True) if flag and place not in inside)

    def part(self, group: Iterable[int]) -> Form:
        """The part of the term that is over these leaves."""
        return form_over(self.form, [self.places.index(place) for place in group])


def _terms(fisher: Operator, sharing: Sharing, caller: str) -> list[_Term]:
    terms = [_Term(places, form, _layers(places, form, sharing)) for places, form in terms_of(fisher.form)]
    if not any(term.layers or term.form.as_scores() is not None for term in terms):
        scores_of(fisher, caller)
    return terms


def _layers(places: Places, form: Form, sharing: Sharing) -> tuple[tuple[Places, Kronecker], ...]:
    """The layers of one term that have factors: the places of their leaves, and the factors as a Kronecker product."""
    if isinstance(form, EigenKronecker):
        form = form.nearest_kronecker(sharing.name)
    if isinstance(form, Kronecker):
        return ((places, form),)
    scores = form.as_scores()
    if scores is None:
        return ()
    if not isinstance(scores, FactoredScores):
        raise TypeError(
            f"a Fisher held {form.name} is a covariance of scores, which is no sum of Kronecker products and has no factors. "
            "Take the view of scores that are not centred, or jf.eigen_kronecker(fisher, basis) with such a view as the basis."
        )
    found: list[tuple[Places, Kronecker]] = []
    members: dict[int, list[int]] = {}
    for i, role in enumerate(scores.roles):
        members.setdefault(i if role.layer is None else role.layer, []).append(i)
    for k, made in enumerate(sharing.moments(scores)):
        if made is not None:
            group = tuple(members[k])
            inputs, outputs, unit = made.factors()
            spec, side = _spec_of(form.spec, group), inputs._replace(core=_symmetric(inputs.core))
            block = Kronecker(side, _symmetric(outputs), made.count, unit, made.layout, group.index(k), sharing.name, spec)
            found.append((tuple(places[i] for i in group), block))
    return tuple(found)


def _symmetric(x: Array) -> Array:
    return 0.5 * (x + x.swapaxes(1, 2))


def _spec_of(spec: ParamSpec, group: Sequence[int]) -> ParamSpec:
    return spec.at(sorted(group), jax.tree.structure([0] * len(group)))


def _connected(groups: Iterable[Places]) -> list[Places]:
    """The groups, with those that share a leaf merged, in the order of their first leaves."""
    found: list[set[int]] = []
    for group in groups:
        touching = [other for other in found if not other.isdisjoint(group)]
        found = [other for other in found if other.isdisjoint(group)] + [set(group).union(*touching)]
    return sorted(tuple(sorted(group)) for group in found)


def _layered(fisher: Operator, sharing: Sharing, rest: View, caller: str) -> Operator:
    check_function("rest", rest, VIEW)
    terms = _terms(fisher, sharing, caller)
    members = _connected(group for term in terms for group, _ in term.layers)
    blocks = [_block(_spec_of(fisher.spec, group), group, terms) for group in members]
    return _with_rest(fisher, blocks, members, rest)


def _block(spec: ParamSpec, members: Places, terms: Sequence[_Term]) -> Form:
    """The block over some leaves: one product (or several) of the terms that have factors there, plus what the others add."""
    factors = [(group, block) for term in terms for group, block in term.layers if group[0] in members]
    products = [(group, merged(alike)) for group, alike in _alike(factors)]
    shift, entries = _added(spec, members, terms)
    if len(products) == 1:
        ((_, product),) = products
        product = dataclasses.replace(product, spec=spec)
        block: Form = product if entries is None else merged([product, product.of_diagonal(entries)])
    else:
        parts = [_embedded(group, product, members, spec) for group, product in products]
        parts += [] if entries is None else [Diagonal(entries, spec)]
        block = functools.reduce(added, parts)
    return block if shift is None else Shifted(block, shift)


def _alike(factors: Sequence[tuple[Places, Kronecker]]) -> list[tuple[Places, list[Kronecker]]]:
    """The blocks grouped by weight and layout; a block without a bias joins those of the same weight that have one."""
    found: list[tuple[Places, list[Kronecker]]] = []
    for group, block in sorted(factors, key=lambda pair: -len(pair[0])):
        for places, others in found:
            turned = block.turned_to(others[0].layout)
            if turned is not None and places[others[0].weight] == group[block.weight] and set(group) <= set(places):
                others.append(turned.widened(others[0]))
                break
        else:
            found.append((group, [block]))
    return found


def _added(spec: ParamSpec, members: Places, terms: Sequence[_Term]) -> tuple[Scalar | None, Any]:
    """The contribution of terms without factors for some leaves: a multiple of the identity, and a diagonal."""
    shift: Scalar | None = None
    entries: dict[int, Array] = {}
    for term in terms:
        group = [place for place in term.loose if place in members]
        if isinstance(term.form, ScaledIdentity) and len(group) == len(members):
            shift = term.form.scale if shift is None else shift + term.form.scale
        elif group:
            for place, leaf in zip(group, jax.tree.leaves(_diagonal(term.part(group))), strict=True):
                entries[place] = entries[place] + leaf if place in entries else leaf
    if not entries:
        return shift, None
    zeros = dict(zip(members, jax.tree.leaves(spec.zeros()), strict=True))
    return shift, spec.tree([entries.get(place, zeros[place]) for place in members])


_diagonal = once(lambda form: form.diagonal())


def _embedded(group: Places, block: Kronecker, members: Places, spec: ParamSpec) -> Form:
    """A block over some of the leaves, extended by zeros to all of them."""
    others = tuple(i for i, place in enumerate(members) if place not in group)
    if not others:
        return dataclasses.replace(block, spec=spec)
    empty = _spec_of(spec, others)
    places = tuple(i for i, place in enumerate(members) if place in group)
    return BlockDiagonal((block, Diagonal(empty.zeros(), empty)), (places, others), spec)


def _with_rest(fisher: Operator, blocks: list[Form], members: list[Places], rest: View) -> Operator:
    inside = {i for group in members for i in group}
    others = tuple(i for i in range(len(fisher.spec.paths)) if i not in inside)
    if others:
        made = as_operator(rest(part_of(fisher, others)), "kronecker: `rest`").form
        if isinstance(made, BlockDiagonal):
            blocks += made.blocks
            members += [tuple(others[i] for i in group) for group in made.members]
        else:
            blocks.append(made)
            members.append(others)
    return Operator(BlockDiagonal(tuple(blocks), tuple(members), fisher.spec), fisher.provenance)
