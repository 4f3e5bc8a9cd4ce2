"""Forecasts: the information of data that do not exist yet, from a simulator of their mean and covariance.

Import it by name: ``from jaxfisher import forecasts``. Marginal errors come from `jaxfisher.standard_errors`, and
`jaxfisher.marginal` treats nuisance parameters as unknown.
"""

from jaxfisher.forecasts._gaussian import bias as bias
from jaxfisher.forecasts._gaussian import conditional_errors as conditional_errors
from jaxfisher.forecasts._gaussian import gaussian_fisher as gaussian_fisher
from jaxfisher.forecasts._gaussian import gaussian_prior as gaussian_prior
