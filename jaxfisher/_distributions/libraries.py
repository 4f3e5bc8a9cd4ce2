"""distrax, NumPyro and TFP-on-JAX: which of them an object comes from, how to call each, and which families we have too.

None of the three is imported: the class of an object says which library it comes from.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxfisher._distributions.base import Distribution
from jaxfisher._distributions.bernoulli import Bernoulli
from jaxfisher._distributions.beta import Beta
from jaxfisher._distributions.categorical import Categorical
from jaxfisher._distributions.dirichlet import Dirichlet
from jaxfisher._distributions.exponential import Exponential
from jaxfisher._distributions.gamma import Gamma
from jaxfisher._distributions.laplace import Laplace
from jaxfisher._distributions.multivariate_normal import MultivariateNormal
from jaxfisher._distributions.negative_binomial import NegativeBinomial
from jaxfisher._distributions.normal import Normal
from jaxfisher._distributions.poisson import Poisson
from jaxfisher._distributions.student_t import StudentT
from jaxfisher._linalg import matmul


@dataclasses.dataclass(frozen=True)
class Library:
    """The differences between libraries: where classes live, how to draw, how to get a KL, and which families are ours too."""

    modules: str
    sample: Callable[[Any, PRNGKeyArray, tuple[int, ...]], Any]
    kl: Callable[[Any, Any], Any]
    families: dict[str, Callable[[Any], Distribution | None]]
    without_fisher: dict[str, str] = dataclasses.field(default_factory=dict)
    """Distributions whose Fisher cannot be had from their draws and their density, and why, with what to do instead."""


def kl_is_flat(obj: Any) -> bool:
    """Whether the library's KL has a derivative of zero at equal arguments, although it is right elsewhere."""
    # TFP's multiply_no_nan(p, gap) drops the derivative by the gap where the gap is zero.
    return _lives_in(type(obj), LIBRARIES["TFP"].modules) and type(obj).__name__ in ("OrderedLogistic", "StoppingRatioLogistic")


def library_of(cls: type) -> str | None:
    """The library whose ``Distribution`` the class derives from, nearest base first."""
    for base in cls.__mro__:
        for name, library in LIBRARIES.items():
            if _lives_in(base, library.modules) and base.__name__ == "Distribution":
                return name
    return None


def _lives_in(cls: type, modules: str) -> bool:
    return cls.__module__ == modules or cls.__module__.startswith(modules + ".")


def why_without_fisher(obj: Any) -> str:
    """The reason why an object has no Fisher, also for a subclass and inside NumPyro's wrappers; empty if it may have one."""
    while obj is not None:
        for base in type(obj).__mro__:
            for library in LIBRARIES.values():
                if _lives_in(base, library.modules) and base.__name__ in library.without_fisher:
                    return library.without_fisher[base.__name__]
        obj = getattr(obj, "base_dist", None)
    return ""


def translate(obj: Any) -> Distribution | None:
    """Our family for a foreign object; None if we have none.

    The class itself decides, not its bases: a subclass may mean something else (TFP's ``Exponential`` is a ``Gamma``).
    """
    for library in LIBRARIES.values():
        if _lives_in(type(obj), library.modules) and type(obj).__name__ in library.families:
            return library.families[type(obj).__name__](obj)
    return None


def independent(obj: Any) -> Any:
    """The distribution inside an object that is a product of independent ones along some axes; else None."""
    if type(obj).__name__ != "Independent":
        return None
    return obj.base_dist if library_of(type(obj)) == "NumPyro" else obj.distribution


# --- conversions to our parameters ---


def _log(x: Any) -> Array:
    """``log x``, with ``-inf`` and a zero derivative at zero: an underflowed softmax has slope zero, and 0 * inf is NaN."""
    x = jnp.asarray(x)
    return jnp.where(x == 0, -jnp.inf, jnp.log(jnp.where(x == 0, 1, x)))


def _logit(probs: Any) -> Array:
    probs = jnp.asarray(probs)
    return _log(probs) - _log(1 - probs)


def _given(parameters: dict[str, Any], direct: str, other: str, convert: Callable[[Any], Array]) -> Any:
    """The parameter ``direct`` if the user gave it, else computed from ``other``."""
    value = parameters[direct]
    return convert(parameters[other]) if value is None else value


def _expanded(obj: Any) -> Distribution | None:
    base = translate(obj.base_dist)
    if base is None:
        return None
    shape = tuple(obj.batch_shape) + tuple(obj.event_shape)
    batch = shape[: len(shape) - base.event_ndim]
    values = [getattr(base, field.name) for field in dataclasses.fields(base)]  # type: ignore[arg-type]
    return type(base)(
        *(
            jnp.broadcast_to(value, batch + value.shape[value.ndim - ndim :])
            for value, ndim in zip(values, base.field_ndims, strict=True)
        )
    )


def _diagonal(scale: Array) -> Array:
    return scale[..., None] * jnp.eye(scale.shape[-1], dtype=scale.dtype)


def _positive(tril: Array) -> Array:
    """The factor of the same covariance with a positive diagonal; distrax and TFP allow any sign."""
    sign = jnp.sign(jnp.diagonal(tril, axis1=-2, axis2=-1))
    return tril * sign[..., None, :]


def _distrax_mvn_tri(d: Any) -> Distribution:
    if d.is_lower:
        return MultivariateNormal(d.loc, _positive(d.scale_tri))
    covariance = matmul(d.scale_tri, jnp.swapaxes(d.scale_tri, -1, -2))
    return MultivariateNormal(d.loc, jnp.linalg.cholesky(covariance))


def _tfp_mvn(d: Any) -> Distribution:
    # TFP's scale is a linear operator, lower triangular for the classes in the table; a missing location means zero.
    scale = _positive(d.scale.to_dense())
    return MultivariateNormal(jnp.zeros(scale.shape[-1:], scale.dtype) if d.loc is None else d.loc, scale)


def _gamma_poisson(total_count: Any, log_rate: Array) -> Distribution:
    """Poisson mixed over a Gamma: mean ``r / rate``, variance ``mu + mu^2 / r``."""
    log_count = _log(total_count)
    return NegativeBinomial(log_count - log_rate, -log_count)


_DISTRAX: dict[str, Callable[[Any], Distribution | None]] = {
    "Normal": lambda d: Normal(d.loc, d.scale),
    "LogStddevNormal": lambda d: Normal(d.loc, jnp.exp(d.log_scale)),
    # For an object made from `probs`, distrax's `logits` is a plain logarithm, whose derivative is NaN at an underflowed one.
    "Categorical": lambda d: Categorical(_given(vars(d), "_logits", "_probs", _log)),
    "Bernoulli": lambda d: Bernoulli(_given(vars(d), "_logits", "_probs", _logit)),
    "Gamma": lambda d: Gamma(d.concentration, d.rate),
    "Beta": lambda d: Beta(d.alpha, d.beta),
    "Dirichlet": lambda d: Dirichlet(d.concentration),
    "Laplace": lambda d: Laplace(d.loc, d.scale),
    "MultivariateNormalTri": _distrax_mvn_tri,
    "MultivariateNormalDiag": lambda d: MultivariateNormal(d.loc, _positive(_diagonal(d.scale_diag))),
    "MultivariateNormalFullCovariance": lambda d: MultivariateNormal(d.loc, jnp.linalg.cholesky(d.covariance_matrix)),
}

_NUMPYRO: dict[str, Callable[[Any], Distribution | None]] = {
    "Normal": lambda d: Normal(d.loc, d.scale),
    "CategoricalLogits": lambda d: Categorical(d.logits),
    "CategoricalProbs": lambda d: Categorical(_log(d.probs)),
    "BernoulliLogits": lambda d: Bernoulli(d.logits),
    "BernoulliProbs": lambda d: Bernoulli(_logit(d.probs)),
    "Poisson": lambda d: Poisson(_log(d.rate)),
    "Exponential": lambda d: Exponential(_log(d.rate)),
    "Gamma": lambda d: Gamma(d.concentration, d.rate),
    "Beta": lambda d: Beta(d.concentration1, d.concentration0),
    "Dirichlet": lambda d: Dirichlet(d.concentration),
    "Laplace": lambda d: Laplace(d.loc, d.scale),
    "StudentT": lambda d: StudentT(d.df, d.loc, d.scale),
    "MultivariateNormal": lambda d: MultivariateNormal(d.loc, d.scale_tril),
    "GammaPoisson": lambda d: _gamma_poisson(d.concentration, _log(d.rate)),
    "NegativeBinomial2": lambda d: _gamma_poisson(d.concentration, _log(d.rate)),
    "NegativeBinomialLogits": lambda d: _gamma_poisson(d.total_count, -d.logits),
    "NegativeBinomialProbs": lambda d: _gamma_poisson(d.total_count, -_logit(d.probs)),
    "ExpandedDistribution": _expanded,
}

_CENSORED = (
    "its draws are not censored, and its log-density takes the times of censoring for data. Use jf.empirical_fisher or "
    "jf.observed_information of its log_prob."
)
_POINT_MASS = "it is a point mass, and two that differ have no common outcome. Use a density with a scale, such as jf.Normal."
_NUMPYRO_WITHOUT_FISHER = {
    "Delta": _POINT_MASS,
    "Unit": "it is a factor and not a distribution. Add the factor to a loss of your own.",
    "LeftCensoredDistribution": _CENSORED,
    "RightCensoredDistribution": _CENSORED,
    "IntervalCensoredDistribution": _CENSORED,
}

# Read TFP's `parameters`, which are what the user gave: its Bernoulli keeps float64 logits from NumPy as float32.
_TFP: dict[str, Callable[[Any], Distribution | None]] = {
    "Normal": lambda d: Normal(d.loc, d.scale),
    "Categorical": lambda d: Categorical(_given(d.parameters, "logits", "probs", _log)),
    "Bernoulli": lambda d: Bernoulli(_given(d.parameters, "logits", "probs", _logit)),
    "Poisson": lambda d: Poisson(_given(d.parameters, "log_rate", "rate", _log)),
    "Exponential": lambda d: Exponential(_log(d.rate)),
    "Gamma": lambda d: Gamma(d.concentration, _given(d.parameters, "rate", "log_rate", jnp.exp)),
    "Beta": lambda d: Beta(d.concentration1, d.concentration0),
    "Dirichlet": lambda d: Dirichlet(d.concentration),
    "Laplace": lambda d: Laplace(d.loc, d.scale),
    "StudentT": lambda d: StudentT(d.df, d.loc, d.scale),
    "MultivariateNormalTriL": _tfp_mvn,
    "MultivariateNormalDiag": _tfp_mvn,
    "MultivariateNormalFullCovariance": _tfp_mvn,
    "NegativeBinomial": lambda d: _gamma_poisson(d.total_count, -_given(d.parameters, "logits", "probs", _logit)),
}

LIBRARIES: dict[str, Library] = {
    "distrax": Library(
        "distrax",
        lambda d, key, shape: d.sample(seed=key, sample_shape=shape),
        lambda p, q: p.kl_divergence(q),
        _DISTRAX,
        {"Deterministic": _POINT_MASS},
    ),
    "NumPyro": Library(
        "numpyro.distributions",
        lambda d, key, shape: d.sample(key, shape),
        # The module is loaded, since an object of it exists.
        lambda p, q: sys.modules["numpyro.distributions"].kl_divergence(p, q),
        _NUMPYRO,
        _NUMPYRO_WITHOUT_FISHER,
    ),
    "TFP": Library(
        "tensorflow_probability.substrates.jax",
        lambda d, key, shape: d.sample(shape, seed=key),
        lambda p, q: p.kl_divergence(q),
        _TFP,
        {"Deterministic": _POINT_MASS, "VectorDeterministic": _POINT_MASS},
    ),
}
