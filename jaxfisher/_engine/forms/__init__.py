r"""Leaf forms: how the gradients of one parameter leaf are stored for all rows, and what is computed from them.

The gradient ``D`` of a leaf is, for one row,

.. math:: D_{bio} = \sum_t a_{bti}\, g_{bto}

with groups b, and the T positions t that share the weight. This is a `Product`. In a `Lookup` the ``a`` are rows of the
identity, in a `Convolution` they are an image seen through windows, and a `Formed` gradient is stored as it is. A `Leaf` is the
sum of its forms.
"""

from jaxfisher._engine.forms.arrays import Seal, sealed, unsealed
from jaxfisher._engine.forms.basis import Basis, squares_along
from jaxfisher._engine.forms.convolution import Convolution
from jaxfisher._engine.forms.cost import by_factors, gram_flops, inner_cost, working
from jaxfisher._engine.forms.form import Form
from jaxfisher._engine.forms.formed import Formed
from jaxfisher._engine.forms.gram import cross_gram, gram_upper
from jaxfisher._engine.forms.layout import Layout, plain_layout
from jaxfisher._engine.forms.leaf import Leaf, leaf_of
from jaxfisher._engine.forms.lookup import Lookup
from jaxfisher._engine.forms.moments import Moments, expanded_moments, has_moments, reduced_moments
from jaxfisher._engine.forms.outer import outer, outer_moment
from jaxfisher._engine.forms.product import Product
from jaxfisher._engine.forms.squares import diagonal, squared_norms

__all__ = [
    "Basis",
    "Convolution",
    "Form",
    "Formed",
    "Layout",
    "Leaf",
    "Lookup",
    "Moments",
    "Product",
    "Seal",
    "by_factors",
    "cross_gram",
    "diagonal",
    "expanded_moments",
    "gram_flops",
    "gram_upper",
    "has_moments",
    "inner_cost",
    "leaf_of",
    "outer",
    "outer_moment",
    "plain_layout",
    "reduced_moments",
    "sealed",
    "squared_norms",
    "squares_along",
    "unsealed",
    "working",
]
