"""Information geometry as function transformations in JAX: KL divergences, Fisher matrices, natural gradients.

Data flows one way: a model of one example, its scores, a Fisher operator, a solve, an update.
"""

# Distributions: what a model may predict.
from jaxfisher._distributions.base import Distribution as Distribution
from jaxfisher._distributions.bernoulli import Bernoulli as Bernoulli
from jaxfisher._distributions.beta import Beta as Beta
from jaxfisher._distributions.categorical import Categorical as Categorical
from jaxfisher._distributions.dirichlet import Dirichlet as Dirichlet
from jaxfisher._distributions.exponential import Exponential as Exponential
from jaxfisher._distributions.gamma import Gamma as Gamma
from jaxfisher._distributions.laplace import Laplace as Laplace
from jaxfisher._distributions.multivariate_normal import MultivariateNormal as MultivariateNormal
from jaxfisher._distributions.negative_binomial import NegativeBinomial as NegativeBinomial
from jaxfisher._distributions.normal import Normal as Normal
from jaxfisher._distributions.poisson import Poisson as Poisson
from jaxfisher._distributions.student_t import StudentT as StudentT

# Models and scores.
from jaxfisher._model import log_likelihood as log_likelihood

# Natural gradients.
from jaxfisher._scores import Scores as Scores
from jaxfisher._scores import scores as scores

__version__ = "0.1.0"
