r"""Scores: the gradients of log-densities, one row for each example, as one linear map ``S : R^p -> R^rows``.

A *row function* maps the parameters and one example to the rows that example contributes: one for a score at a datum, one per
draw for a sampled Fisher, one per column of the output metric's square root for the exact Fisher. Its result is a pytree
like the parameters whose leaves have a leading axis of rows. Everything that the library computes from scores goes through the
methods of `Scores`; nothing outside this folder knows how the rows are held.

Rows carry weights ``omega_i`` (``1/n`` each for a mean over n examples), so that the Fisher is ``S^T diag(omega) S``.
"""

from jaxfisher._scores.centred import CenteredScores
from jaxfisher._scores.held import HeldScores
from jaxfisher._scores.making import centred, make_scores, scores, values_and_scores
from jaxfisher._scores.map import (
    ClippedSum,
    FactoredScores,
    Scores,
    check_one_row_each,
    examples_of,
    one_a_row,
)
from jaxfisher._scores.pieces import JoinedScores

__all__ = [
    "CenteredScores",
    "ClippedSum",
    "FactoredScores",
    "HeldScores",
    "JoinedScores",
    "Scores",
    "centred",
    "check_one_row_each",
    "examples_of",
    "make_scores",
    "one_a_row",
    "scores",
    "values_and_scores",
]
