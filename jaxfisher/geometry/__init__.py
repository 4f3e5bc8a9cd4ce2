"""The geometry of models: distances, geodesics and divergences in the metric of the Fisher information.

Import it by name: ``from jaxfisher import geometry``.
"""

from jaxfisher.geometry._distances import covariance_distance as covariance_distance
from jaxfisher.geometry._distances import distance as distance
from jaxfisher.geometry._distances import mahalanobis_distance as mahalanobis_distance
from jaxfisher.geometry._divergences import alpha_divergence as alpha_divergence
from jaxfisher.geometry._divergences import renyi_divergence as renyi_divergence
from jaxfisher.geometry._geodesics import Geodesic as Geodesic
from jaxfisher.geometry._geodesics import christoffel as christoffel
from jaxfisher.geometry._geodesics import exponential_map as exponential_map
from jaxfisher.geometry._geodesics import geodesic as geodesic
from jaxfisher.geometry._geodesics import log_jeffreys as log_jeffreys
from jaxfisher.geometry._geodesics import natural_gradient_flow as natural_gradient_flow
