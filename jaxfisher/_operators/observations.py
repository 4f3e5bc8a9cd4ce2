"""The number of observations behind a Fisher, by which a covariance or an influence divides."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from jaxfisher._operators.operator import Operator
from jaxfisher._provenance import Provenance
from jaxfisher._values import check_number, positive


def means(fisher: Operator) -> list[Provenance]:
    """The terms of an operator that are means over examples."""
    return [part for part in fisher.provenance.parts or (fisher.provenance,) if part.mass is not None]


def observations(fisher: Operator, n: chex.Numeric | None, caller: str) -> chex.Numeric:
    """``n`` if it is given, else the number of observations in the operator's mean: the sum of its weights.

    The terms of a sum may share their observations, as two heads do, or have different ones. A multiple of a mean may be the
    information of all the data, ``n F``. In these cases the number is ambiguous, and ``n`` must be given.
    """
    if n is not None:
        check_number("n", n, "a number of observations, of those that the parameters were fitted to")
        return positive("n", n, fisher.spec.dtype)
    found = means(fisher)
    if len(found) != 1 or found[0].mean.scaled:
        several = "a sum of several means, over the same observations or over others"
        what = several if len(found) > 1 else "a multiple of a mean" if found else "no mean over examples"
        raise ValueError(
            f"{caller}: {fisher} is {what}, so that the number of observations is not known. Give `n`; n = 1 "
            "if the operator is the information of all the data."
        )
    return jnp.asarray(found[0].mass, fisher.spec.dtype)
