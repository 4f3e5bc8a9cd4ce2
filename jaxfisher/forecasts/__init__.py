"""Forecasts: what data that are not there yet will tell, from a simulator of their mean and covariance.

Import it by name: ``from jaxfisher import forecasts``. Marginal errors are `jaxfisher.standard_errors`, and nuisance parameters
are taken for unknown by `jaxfisher.marginal`.
"""

from jaxfisher.forecasts._gaussian import bias as bias
from jaxfisher.forecasts._gaussian import conditional_errors as conditional_errors
from jaxfisher.forecasts._gaussian import gaussian_fisher as gaussian_fisher
from jaxfisher.forecasts._gaussian import gaussian_prior as gaussian_prior
