"""The terms of a form, down to the forms that hold arrays, for views that are taken term by term."""

from __future__ import annotations

from jaxfisher._operators.block import BlockDiagonal
from jaxfisher._operators.form import Form
from jaxfisher._operators.from_scores import FromScores
from jaxfisher._operators.identity import ScaledIdentity, Shifted
from jaxfisher._operators.sum import Sum
from jaxfisher._scores import FactoredScores, JoinedScores

Places = tuple[int, ...]
"""The positions of some leaves among the parameters' leaves, in their order."""


def terms_of(form: Form) -> tuple[tuple[Places, Form], ...]:
    """The terms of a form, each with the places of the leaves that it is over."""
    everything = tuple(range(len(form.spec.paths)))
    if isinstance(form, Sum):
        return tuple(term for part in form.terms for term in terms_of(part))
    if isinstance(form, Shifted):
        return (*terms_of(form.base), (everything, ScaledIdentity(form.shift, form.spec)))
    if isinstance(form, BlockDiagonal):
        parts = [(group, term) for group, block in zip(form.members, form.blocks, strict=True) for term in terms_of(block)]
        return tuple((tuple(group[i] for i in places), term) for group, (places, term) in parts)
    if isinstance(form, FromScores) and isinstance(form.scores, JoinedScores):
        # Each block of joined rows is a term of the sum.
        return tuple(term for part in form.scores.parts for term in terms_of(FromScores(part)))
    return ((everything, form),)


def num_moving(form: Form) -> int:
    """The number of parameters, without those on which no score depends, as far as the program of the scores shows it."""
    found: set[int] = set()
    for places, term in terms_of(form):
        scores = term.scores if isinstance(term, FromScores) else None
        roles = scores.roles if isinstance(scores, FactoredScores) else ()
        found.update(place for i, place in enumerate(places) if not roles or roles[i].touched)
    return sum(form.spec.sizes[place] for place in found)
