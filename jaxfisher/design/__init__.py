"""The design of experiments: where to measure so that the information is largest.

Import it by name: ``from jaxfisher import design``. The gradient in the points of measurement needs nothing from here: it is
``jax.grad(lambda x: jf.exact_fisher(model)(params, x).logdet(0.0))(x)``.
"""

from jaxfisher.design._criteria import a_criterion as a_criterion
from jaxfisher.design._criteria import d_criterion as d_criterion
from jaxfisher.design._criteria import e_criterion as e_criterion
from jaxfisher.design._criteria import informations as informations
from jaxfisher.design._search import Design as Design
from jaxfisher.design._search import Exchanged as Exchanged
from jaxfisher.design._search import exchange as exchange
from jaxfisher.design._search import optimal_weights as optimal_weights
