"""Statistics of estimates from Fisher information: fits, standard errors, sandwiches, intervals, criteria.

``jf.fit``, ``jf.covariance``, ``jf.standard_errors`` and ``jf.sandwich`` are also names of the package; for the others write
``from jaxfisher import statistics``. In all of them weights say how often an observation occurs.
"""

from jaxfisher.statistics._covariance import covariance as covariance
from jaxfisher.statistics._covariance import cramer_rao_bound as cramer_rao_bound
from jaxfisher.statistics._covariance import delta_method as delta_method
from jaxfisher.statistics._covariance import sandwich as sandwich
from jaxfisher.statistics._covariance import standard_errors as standard_errors
from jaxfisher.statistics._criteria import aic as aic
from jaxfisher.statistics._criteria import tic as tic
from jaxfisher.statistics._fit import Fit as Fit
from jaxfisher.statistics._fit import firth as firth
from jaxfisher.statistics._fit import fit as fit
from jaxfisher.statistics._intervals import Interval as Interval
from jaxfisher.statistics._intervals import likelihood_interval as likelihood_interval
from jaxfisher.statistics._intervals import score_interval as score_interval
from jaxfisher.statistics._intervals import wald_interval as wald_interval
from jaxfisher.statistics._robust import cluster_factor as cluster_factor
from jaxfisher.statistics._robust import dispersion as dispersion
from jaxfisher.statistics._robust import hc1 as hc1
from jaxfisher.statistics._robust import hc2 as hc2
from jaxfisher.statistics._robust import hc3 as hc3
from jaxfisher.statistics._robust import leverages as leverages
from jaxfisher.statistics._robust import meat as meat
