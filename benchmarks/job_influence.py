"""Influence of training examples on test predictions, against per-example gradients of both that are formed in memory."""

from __future__ import annotations

from engine import Case, Row, Sizes, compiled, digits, gains, mlp, mlp_log_prob, plain_scores, shape_name, time_in_turn

# isort: split

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jaxfisher as jf

DAMPING = 1e-3


def plain_influence(fisher: jf.Operator, params: Any, train: Any, test: Any) -> jax.Array:
    """The influences by the same solves, and a product with the n x p matrix of per-example gradients."""
    rows, others = (plain_scores(mlp_log_prob)(params, *data) for data in (train, test))

    def solve(row: jax.Array) -> jax.Array:
        return fisher.spec.ravel(fisher.solve(fisher.spec.unravel(row), DAMPING), "v")

    return jnp.matmul(jax.vmap(solve)(others), rows.T, precision="highest") / len(rows)


def our_influence(fisher: jf.Operator, params: Any, train: Any, test: Any) -> jax.Array:
    """The influences by the library, from the factors of the training scores."""
    return jf.influence(mlp_log_prob, fisher, len(train[1]))(params, train, test, DAMPING)[0]


def plain_tracin(params: Any, train: Any, test: Any) -> jax.Array:
    """TracIn by inner products of per-example gradients."""
    rows, others = (plain_scores(mlp_log_prob)(params, *data) for data in (train, test))
    return jnp.matmul(others, rows.T, precision="highest")


def our_tracin(params: Any, train: Any, test: Any) -> jax.Array:
    """TracIn by the library, from the factors of both."""
    return jf.tracin(mlp_log_prob)([params], train, test)


def line(case: str, cases: Sequence[Case], goal: float, repeats: int) -> Row:
    """A row: times, the relative difference, and temporary memory."""
    plain, ours = cases
    difference = jnp.max(jnp.abs(ours() - plain())) / jnp.max(jnp.abs(plain()))
    saved = plain.temporary / max(ours.temporary, 1)
    note = f"relative difference {difference:.0e}; {saved:.3g} times less temporary memory"
    return gains(case, *time_in_turn(cases, repeats), goal=goal, note=note)


def rows(sizes: Sizes) -> list[Row]:
    """Influence by EKFAC, and TracIn at one checkpoint, against per-example gradients that are held."""
    params, x, y = mlp(sizes.small, sizes.examples(1024))
    train, name = (x, y), shape_name(sizes.small, len(y))
    fisher = jf.eigen_kronecker(jf.empirical_fisher(mlp_log_prob)(params, *train))
    few, many = (digits(sizes.examples(m)) for m in (16, 128))
    influences = [compiled(each, fisher, params, train, few) for each in (plain_influence, our_influence)]
    traced = [compiled(each, params, train, many) for each in (plain_tracin, our_tracin)]
    return [
        line(f"EKFAC, {name}, {len(few[1])} test", influences, 1, sizes.repeats),
        line(f"TracIn, {name}, {len(many[1])} test", traced, 5, sizes.repeats),
    ]
