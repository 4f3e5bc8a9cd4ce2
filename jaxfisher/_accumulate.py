"""Means over more data than memory holds: the Fishers of batches, merged one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxfisher._examples import batches_of
from jaxfisher._fisher import FisherFunction
from jaxfisher._once import once, once_for
from jaxfisher._operators.averaging import mean_of
from jaxfisher._operators.operator import VIEW, Operator, View, as_operator
from jaxfisher._provenance import Provenance, check_terms
from jaxfisher._readings import Around
from jaxfisher._tree import check_function


def merge(one: Operator, other: Operator) -> Operator:
    r"""The mean over the examples of two Fishers, in their common form.

    .. math:: \frac{W F + V G}{W + V}, \qquad W = \sum w_i \text{ over the examples of } F,

    where W is the number of examples if no weights were given; a mean with weights can be merged with one without. The result
    is exact: the view of both batches together, whatever their sizes. The factors of Kronecker views of scores are means of
    second moments over the positions that each view counted, and are merged as such. Forms held by eigenvectors can be merged
    if both have the same eigenvectors.

    Args:
        one: a view of one batch, or the result of an earlier merge. Its form must not grow with the number of examples.
        other: the same view of another batch.

    Returns:
        An operator of the same structure, so that a loop can carry it, also inside `jax.lax.scan`. If only one of the two has
        weights, the result has.

    Raises:
        TypeError: an argument is no operator; its form has no mean of the same form, as scores have none; it is a sum, or no
            mean over examples; it is a marginal or a covariance of the score, computed from all examples together.
        ValueError: the operators are over other parameters, or of other kinds or forms; only one of them was multiplied by a
            number, or counts terms.

    Reference: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances (1979),
    section 2, for merging means.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> fisher = jf.empirical_fisher(jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0)))
    >>> F, G = (jf.dense(fisher(0.0, x)) for x in (jnp.array([1.0, 2.0]), jnp.array([4.0])))
    >>> print(jf.merge(F, G), jf.merge(F, G).as_matrix())  # (1 + 4 + 16) / 3
    Fisher(empirical, mean over 3, params 1, dense) [[7.]]
    """
    one, other = as_operator(one, "merge"), as_operator(other, "merge")
    one.spec.check_same(other.spec, f"merge: cannot merge {one} and {other}")
    for fisher in (one, other):
        if fisher.provenance.mass is None:
            raise TypeError(f"merge: {fisher} is no mean over examples; merge means, and add or multiply afterwards.")
        check_terms(fisher.provenance, fisher, "merge", _MERGE_FIRST)
    if one.provenance.mean.weighted or other.provenance.mean.weighted:
        # Without weights each example has weight one, so the two means differ in name only.
        one, other = _weighted(one), _weighted(other)
    structures: list[Any] = [jax.tree.structure(fisher) for fisher in (one, other)]
    if structures[0] != structures[1]:
        raise ValueError(f"merge: cannot merge {one} and {other}: {_difference(one, other)}")
    return _merged(one, other)


_MERGE_FIRST = (
    "Merge dense Fishers, and take the marginal of the result; for a covariance, merge them without `center` and subtract the "
    "outer product of the mean score."
)


def _weighted(fisher: Operator) -> Operator:
    """The same operator, described as a weighted mean."""
    views_of = None if fisher.views_of is None else _weighted(fisher.views_of)
    return Operator(fisher.form, fisher.provenance.weighted(), views_of)


def _difference(one: Operator, other: Operator) -> str:
    """How two operators of different structures differ, and what to merge instead, for a message."""
    mine, theirs = one.provenance, other.provenance
    if mine.kind != theirs.kind:
        return f"one is {mine.kind}, the other {theirs.kind}; expected two Fishers of one kind."
    if mine.mean.counted != theirs.mean.counted:
        return "only one is a mean over the terms that `counts` says; give `counts` for the batches of both, or of neither."
    if mine.mean != theirs.mean:
        return f"one is a {mine.mean} its examples, the other a {theirs.mean} them; merge means, and multiply afterwards."
    return (
        "their forms have different structures; expected the same view of both, in a form that does not grow with the "
        "examples, such as jf.diagonal or jf.kronecker."
    )


@once
def _merged(one: Operator, other: Operator) -> Operator:
    mine, theirs = one.provenance, other.provenance
    mass = mine.mass + theirs.mass  # type: ignore[operator]
    provenance = Provenance(mine.kind, mine.examples + theirs.examples, mass, mine.mean)  # type: ignore[operator]
    views_of = None if one.views_of is None or other.views_of is None else _merged(one.views_of, other.views_of)

    def chosen(a: Array, b: Array, both: Array) -> Array:
        # A batch that is all padding has no mean of its own, and does not change the result.
        return jnp.where(theirs.mass == 0, a, jnp.where(mine.mass == 0, b, both))

    form = jax.tree.map(chosen, one.form, other.form, mean_of(one.form, other.form, theirs.mass / mass))
    return Operator(form, provenance, views_of)


class Accumulation(Protocol):
    """``accumulated(params, batches, start=None) -> Operator``."""

    def __call__(self, params: chex.ArrayTree, batches: Iterable[Any], start: Operator | None = None) -> Operator: ...


def accumulate(fisher: FisherFunction, view: View) -> Accumulation:
    r"""The view of a Fisher over a stream of batches, one in memory at a time: the exact mean over all examples.

    .. math:: F = \frac{\sum_b W_b F_b}{\sum_b W_b}, \qquad W_b = \sum_{i \in b} w_i.

    Batches may differ in size, at the cost of one compilation for every size. The result is an operator and a pytree. Save it,
    and pass it as ``start`` to resume; the final bits are the same. To save along the way, take some batches at a time
    (`itertools.islice`). For a progress bar, pass ``tqdm(batches)``. On a mesh, pass batches that are sharded over it.

    **When it is the wrong one.** `jaxfisher.scale_by_fisher` takes running means while parameters move. If all data fit in
    memory, a ``batch_size`` bounds memory as well. Low-rank views of batches have no exact mean of their rank;
    `jaxfisher.sketch` has one with an error bound. A covariance of the score and a marginal use all examples at once,
    and `merge` refuses them.

    Args:
        fisher: ``(params, *batch) -> operator``, such as `jaxfisher.exact_fisher` returns, or a function of your own, which may
            pass ``weights=``, or draw with a key that is a part of the batch.
        view: a view whose form does not grow with the examples: `jaxfisher.diagonal`, `jaxfisher.dense`,
            `jaxfisher.kronecker`, ``lambda F: jf.block_diagonal(jf.dense(F))``; or, in a second pass over the data, ``lambda F:
            jf.eigen_kronecker(F, basis)`` in the basis that the first pass gave.

    Returns:
        A function ``(params, batches, start=None)`` of any iterable of batches. A batch is a tuple or list of the arguments
        that ``fisher`` takes after the parameters, or its only array; NumPy arrays are accepted.

    Raises:
        TypeError: ``fisher`` or ``view`` is no function; (when called) batches that cannot be iterated over.
        ValueError: (when called) no batch and no ``start``; and as in `jaxfisher.merge`.

    Reference: George, Laurent, Bouthillier, Ballas and Vincent, Fast approximate natural gradient descent in a
    Kronecker-factored eigenbasis (NeurIPS 2018), for the two passes of the eigen-Kronecker form.

    >>> import numpy as np, jaxfisher as jf
    >>> batches = [(np.array([1.0, 3.0]),), (np.array([2.0]),)]
    >>> fisher = jf.exact_fisher(lambda w, x: jf.Poisson(log_rate=w * x))
    >>> F = jf.accumulate(fisher, jf.diagonal)(0.0, batches)
    >>> print(F, F.trace().round(4))  # mean of x^2
    Fisher(exact, mean over 3, params 1, diagonal) 4.6667
    """
    check_function("fisher", fisher, "(params, *batch) -> operator")
    check_function("view", view, VIEW)

    viewed = _Viewed(fisher, view)

    def accumulated(params: chex.ArrayTree, batches: Iterable[Any], start: Operator | None = None) -> Operator:
        mean = start
        for batch in batches_of(batches, "accumulate: `batches`"):
            new = _of_batch(viewed, params, batch)
            mean = new if mean is None else merge(mean, new)
        if mean is None:
            raise ValueError("accumulate: `batches` has no batch; a mean needs at least one.")
        return mean

    return accumulated


@dataclasses.dataclass(frozen=True)
class _Viewed(Around):
    """The view of a Fisher as a function of parameters and a batch."""

    fisher: FisherFunction
    view: View


@once_for
def _of_batch(viewed: _Viewed, params: chex.ArrayTree, batch: tuple[Any, ...]) -> Operator:
    made = as_operator(viewed.fisher(params, *batch), "accumulate: `fisher`")
    return as_operator(viewed.view(made), "accumulate: `view`")
