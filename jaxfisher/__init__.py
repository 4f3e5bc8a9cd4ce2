"""Information geometry as function transformations in JAX: KL divergences, Fisher matrices, natural gradients.

Data flows one way: a model of one example, its scores, a Fisher operator, a solve, an update.
"""

# Distributions: what a model predicts for one example.
from jaxfisher._distributions.base import Distribution as Distribution
from jaxfisher._distributions.bernoulli import Bernoulli as Bernoulli
from jaxfisher._distributions.beta import Beta as Beta
from jaxfisher._distributions.categorical import Categorical as Categorical
from jaxfisher._distributions.dirichlet import Dirichlet as Dirichlet
from jaxfisher._distributions.exponential import Exponential as Exponential
from jaxfisher._distributions.gamma import Gamma as Gamma
from jaxfisher._distributions.joint import Joint as Joint
from jaxfisher._distributions.laplace import Laplace as Laplace
from jaxfisher._distributions.masked import Masked as Masked
from jaxfisher._distributions.multivariate_normal import MultivariateNormal as MultivariateNormal
from jaxfisher._distributions.negative_binomial import NegativeBinomial as NegativeBinomial
from jaxfisher._distributions.normal import Normal as Normal
from jaxfisher._distributions.poisson import Poisson as Poisson
from jaxfisher._distributions.student_t import StudentT as StudentT

# Models: from a distribution to a log-density.
from jaxfisher._model import log_likelihood as log_likelihood

# Divergences, and two Hessians.
from jaxfisher._divergence import kl as kl
from jaxfisher._divergence import kl_divergence as kl_divergence
from jaxfisher._divergence import kl_hessian as kl_hessian
from jaxfisher._divergence import monte_carlo_kl as monte_carlo_kl
from jaxfisher._divergence import observed_information as observed_information

# Scores, and an explanation of how they are held.
from jaxfisher._scores import ClippedSum as ClippedSum
from jaxfisher._scores import Scores as Scores
from jaxfisher._scores import scores as scores
from jaxfisher._explain import explain as explain

# Fishers.
from jaxfisher._fisher import empirical_fisher as empirical_fisher
from jaxfisher._fisher import exact_fisher as exact_fisher
from jaxfisher._fisher import fisher_from_scores as fisher_from_scores
from jaxfisher._fisher import implicit_fisher as implicit_fisher
from jaxfisher._fisher import sampled_fisher as sampled_fisher
from jaxfisher._gauss_newton import gauss_newton as gauss_newton
from jaxfisher._accumulate import accumulate as accumulate
from jaxfisher._accumulate import merge as merge

# Operators and their views.
from jaxfisher._operators.operator import Operator as Operator
from jaxfisher._operators.block import block_diagonal as block_diagonal
from jaxfisher._operators.formed import dense as dense
from jaxfisher._operators.formed import from_matrix as from_matrix
from jaxfisher._operators.diagonal import diagonal as diagonal
from jaxfisher._operators.identity import relative_damping as relative_damping
from jaxfisher._operators.identity import scaled_identity as scaled_identity
from jaxfisher._operators.factored import factored_solve as factored_solve
from jaxfisher._operators.layered import eigen_kronecker as eigen_kronecker
from jaxfisher._operators.layered import kronecker as kronecker
from jaxfisher._operators.layered import kronecker_reduce as kronecker_reduce
from jaxfisher._operators.layered import layers as layers
from jaxfisher._operators.low_rank import low_rank as low_rank
from jaxfisher._operators.formed import marginal as marginal
from jaxfisher._operators.low_rank import nystrom as nystrom
from jaxfisher._operators.low_rank import partial_cholesky as partial_cholesky
from jaxfisher._operators.sketch import sketch as sketch
from jaxfisher._operators.spread import spread_solves as spread_solves

# Solving.
from jaxfisher._cholesky import Cholesky as Cholesky
from jaxfisher._least_squares import least_squares as least_squares
from jaxfisher._solve import CG as CG
from jaxfisher._solve import LSMR as LSMR
from jaxfisher._solve import as_lineax as as_lineax
from jaxfisher._solve import solve as solve
from jaxfisher._solve_path import solve_path as solve_path
from jaxfisher._system import SolveInfo as SolveInfo

# Natural gradients in place of `jax.grad`.
from jaxfisher._natural import natural_grad as natural_grad
from jaxfisher._natural import value_and_natural_grad as value_and_natural_grad
from jaxfisher._energy_gradient import energy_gradient as energy_gradient
from jaxfisher._acceleration import acceleration as acceleration
from jaxfisher._residuals import Residuals as Residuals
from jaxfisher._residuals import residuals as residuals

# Optax.
from jaxfisher._transform.adapt_damping import AdaptDampingState as AdaptDampingState
from jaxfisher._transform.adapt_damping import adapt_damping as adapt_damping
from jaxfisher._transform.backtrack_kl import BacktrackKLState as BacktrackKLState
from jaxfisher._transform.backtrack_kl import backtrack_kl as backtrack_kl
from jaxfisher._transform.geodesic_acceleration import GeodesicAccelerationState as GeodesicAccelerationState
from jaxfisher._transform.geodesic_acceleration import geodesic_acceleration as geodesic_acceleration
from jaxfisher._transform.kfac import kfac as kfac
from jaxfisher._transform.levenberg_marquardt import levenberg_marquardt as levenberg_marquardt
from jaxfisher._transform.natural_gradient import natural_gradient as natural_gradient
from jaxfisher._transform.quadratic_model import QuadraticModelState as QuadraticModelState
from jaxfisher._transform.quadratic_model import quadratic_model as quadratic_model
from jaxfisher._transform.scale_by_fisher import ScaleByFisherState as ScaleByFisherState
from jaxfisher._transform.scale_by_fisher import scale_by_fisher as scale_by_fisher
from jaxfisher._transform.scale_to_kl import scale_to_kl as scale_to_kl
from jaxfisher._transform.training_step import training_step as training_step

# Influence: the training examples on which a prediction depends most.
from jaxfisher.influence import influence as influence
from jaxfisher.influence import self_influence as self_influence
from jaxfisher.influence import tracin as tracin

# Continual learning: penalties from the Fishers of earlier tasks, and models merged with their Fishers as weights.
from jaxfisher.continual import ewc_penalty as ewc_penalty
from jaxfisher.continual import fisher_average as fisher_average

# Diagnostics: checks of a model, spectra, and estimates with standard errors.
from jaxfisher._check_fisher import FisherCheck as FisherCheck
from jaxfisher._check_fisher import check_fisher as check_fisher
from jaxfisher._diagnostics import Spectrum as Spectrum
from jaxfisher._diagnostics import effective_dimension as effective_dimension
from jaxfisher._diagnostics import spectrum as spectrum
from jaxfisher._estimate import Estimate as Estimate
from jaxfisher._estimate import estimate_diagonal as estimate_diagonal
from jaxfisher._estimate import estimate_logdet as estimate_logdet
from jaxfisher._estimate import estimate_trace as estimate_trace
from jaxfisher._estimate import spectral_density as spectral_density

# Jobs: complete tasks, each in a module of its own, built from the names above.
from jaxfisher.evidence import tune_prior as tune_prior
from jaxfisher.posterior import Posterior as Posterior
from jaxfisher.posterior import laplace as laplace
from jaxfisher.privacy import clipped_grad as clipped_grad
from jaxfisher.statistics import covariance as covariance
from jaxfisher.statistics import fit as fit
from jaxfisher.statistics import sandwich as sandwich
from jaxfisher.statistics import standard_errors as standard_errors

# Extending: base classes and types for new distributions, forms, views and solvers, and a check of the laws they must satisfy.
from jaxfisher._distributions.base import family as family
from jaxfisher._model import LogProb as LogProb
from jaxfisher._model import Model as Model
from jaxfisher._fisher import FisherFunction as FisherFunction
from jaxfisher._operators.form import Form as Form
from jaxfisher._operators.operator import View as View
from jaxfisher._provenance import Provenance as Provenance
from jaxfisher._pytree import array_fields as array_fields
from jaxfisher._tree import ParamSpec as ParamSpec
from jaxfisher._operators.operator import Solver as Solver
from jaxfisher._transform.update_arguments import fisher_for as fisher_for
from jaxfisher._laws import LawCheck as LawCheck
from jaxfisher._laws import check_laws as check_laws

# Names that do not exist: a room is loaded, or an error says what to write. Type checkers would take any name, so hide it.
import typing as _typing

if not _typing.TYPE_CHECKING:
    from jaxfisher._absent import from_package as __getattr__  # noqa: F401

__version__ = "0.1.0"
