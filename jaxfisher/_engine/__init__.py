"""The engine: from a gradient's program to the factors of every example's gradient.

The gradient of a weight is, for one example, a sum of outer products. The engine reads the gradient's own jaxpr and stops it
one operation short of those products. The files, in the order in which a gradient passes through them:

- `program`: the jaxpr as a flat list of equations.
- `terms`, `windows`: products that are not formed.
- `rule`, `rules`: what a rule is, and what each primitive does to terms.
- `machine`, `loops`: run a program by the rules; `reasons`: why a gradient had to be formed.
- `parts`, `layers`: from terms to the forms of a leaf; a bias joined to its weight.
- `assembly`: all of this, over examples and rows.
- `forms`: how a leaf's gradients are stored, one form per file, and every quantity computed from them.

Code outside this folder imports only the names below, never a file inside it. ``docs/engine.md`` explains the whole engine.
"""

from jaxfisher._engine.assembly import Traced, leaf_forms, trace
from jaxfisher._engine.forms import (
    Basis,
    Layout,
    Leaf,
    Moments,
    Seal,
    by_factors,
    cross_gram,
    diagonal,
    expanded_moments,
    gram_flops,
    gram_upper,
    has_moments,
    inner_cost,
    leaf_of,
    outer,
    outer_moment,
    reduced_moments,
    sealed,
    squared_norms,
    squares_along,
    unsealed,
    working,
)

__all__ = [
    "Basis",
    "Layout",
    "Leaf",
    "Moments",
    "Seal",
    "Traced",
    "by_factors",
    "cross_gram",
    "diagonal",
    "expanded_moments",
    "gram_flops",
    "gram_upper",
    "has_moments",
    "inner_cost",
    "leaf_forms",
    "leaf_of",
    "outer",
    "outer_moment",
    "reduced_moments",
    "sealed",
    "squared_norms",
    "squares_along",
    "trace",
    "unsealed",
    "working",
]
