"""Names that people try and that are not there: most are so deliberately, and the error says what to write instead."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

_Names = Mapping[str, str]


def absent(owner: str, instead: _Names) -> Callable[[Any, str], Any]:
    """A ``__getattr__`` for a class, whose errors say what to write instead of each of these names."""

    def missing(self: Any, name: str) -> Any:
        if name in instead and not hasattr(type(self), name):
            raise AttributeError(f"{owner} has no `{name}`. {instead[name]}", name=name, obj=self)
        # Look the name up again, to raise Python's own error or the error inside a property.
        return object.__getattribute__(self, name)

    return missing


def _each(names: str, text: str) -> _Names:
    return dict.fromkeys(names.split(), text)


OF_OPERATOR = {
    **_each("T H transpose", "It is symmetric: its transpose is `F` itself."),
    **_each(
        "to_dense todense toarray matrix dense", "Write `F.as_matrix()` for an array, or `jf.dense(F)` for a dense operator."
    ),
    **_each("matvec matmul dot", "Write `F.mv(v)` or `F @ v`; for many vectors, `jax.vmap(F.mv)(vectors)`."),
    **_each("inverse inv", "Write `F.solve(v, damping)` for the inverse times a vector; `jf.solve` also reports how it went."),
    "pinv": "Write `F.solve(v, 0.0)`: without damping a solve gives the solution of minimum norm.",
    **_each("diag", "Write `F.diagonal()` for the numbers, or `jf.diagonal(F)` for a diagonal operator."),
    **_each("det slogdet log_det", "Write `F.logdet(damping)`."),
    **_each("eigenvalues eigvals", "Write `F.eigvalsh()`."),
    **_each("eigh eig", "Write `F.eigvalsh()` for the eigenvalues, or `jnp.linalg.eigh(F.as_matrix())`."),
    **_each("cond condition_number", "Divide the largest of `F.eigvalsh()` by the smallest."),
    **_each("cholesky sqrt sqrtm", "Write `F.sqrt_mv(v)` for the symmetric root times a vector."),
    **_each("quadratic_form vFv", "Write `F.quadratic(v)`."),
    "norm": "Write `F.frobenius_norm()`, or `F.eigvalsh()[-1]` for the spectral norm.",
    "dtype": "Write `F.spec.dtype`.",
    "ndim": "It is a matrix, of shape `F.shape`.",
    **_each("damping damped", "Damping is an argument: `F.solve(v, damping)`, `F.logdet(damping)`."),
}
"""Names that an operator ``F`` does not have."""

OF_SCORES = {
    **_each("T H transpose", "Write `S.rmv(w)` for the transpose times a vector."),
    **_each("to_dense todense toarray matrix jacobian", "Write `S.as_matrix()`."),
    **_each("matvec dot", "Write `S.mv(v)` or `S @ v`."),
    **_each("norms norm", "Write `jnp.sqrt(S.squared_norms())`."),
    "mean": "Write `S.rmv(jnp.ones(S.num_rows) / S.num_rows)`.",
    **_each(
        "fisher covariance cov", "Write `jf.fisher_from_scores(S)`; for the covariance, of `jf.scores(log_prob, center=True)`."
    ),
    "dtype": "Write `S.spec.dtype`.",
    **_each("shape ndim", "It is a matrix, of shape `(S.num_rows, S.spec.size)`."),
    **_each("n size", "Write `S.num_rows` for the number of rows, and `S.spec.size` for that of parameters."),
}
"""Names that scores ``S`` do not have."""

_ELSEWHERE = "Distributions of distrax, NumPyro and TFP have it, and are accepted as they are wherever a model returns one."

OF_DISTRIBUTION = {
    **_each("prob pdf pmf", "Write `jnp.exp(d.log_prob(x))`."),
    **_each("logpdf logpmf log_pdf", "Write `d.log_prob(x)`."),
    **_each("stddev std", "Write `jnp.sqrt(d.variance)`."),
    **_each("kl_divergence", "Write `d.kl(other)` or `jf.kl_divergence(d, other)`."),
    "cross_entropy": "Write `d.entropy() + d.kl(other)`.",
    **_each("sample_n rsample rvs", "Write `d.sample(key, (5,))`."),
    **_each("covariance cov", "Its diagonal is `d.variance`; a normal distribution of vectors has `d.covariance`."),
    **_each("cdf log_cdf quantile icdf ppf support", _ELSEWHERE),
}
"""Names that a distribution ``d`` does not have."""

_FOREIGN = "Return one of distrax, NumPyro or TFP from the model: it is accepted as it is."

OF_PACKAGE = {
    **_each(
        "fisher fim fisher_matrix fisher_information fisher_information_matrix",
        "Write `jf.exact_fisher(model)(params, x)` for the expectation over the model's predictions, or "
        "`jf.empirical_fisher(log_prob)(params, x, y)` for the mean over the data.",
    ),
    **_each("KL kl_div", "Write `jf.kl_divergence(p, q)` for two distributions, or `jf.kl(model)(params, moved, x)`."),
    **_each("ggn generalized_gauss_newton", "Write `jf.gauss_newton(predict, loss)(params, x, y)`, or `jf.exact_fisher`."),
    **_each("hessian hvp", "Write `jf.observed_information(log_prob)(params, x, y)`, or `jf.kl_hessian(model)(params, x)`."),
    **_each("KFAC KFACOptimizer", "Write `jf.kfac()`."),
    **_each("EKFAC ekfac", "Write `jf.eigen_kronecker(F)`, or `jf.kfac(view=jf.eigen_kronecker, decay=None)`."),
    **_each("ngd natural_gradient_descent", "Write `jf.natural_gradient(0.1, damping)`."),
    **_each("trpo trust_region", "Write `jf.scale_to_kl(0.1)`, or `jf.backtrack_kl(0.1)` on the divergence itself."),
    **_each("diag", "Write `jf.diagonal(F)`."),
    **_each("block_diag", "Write `jf.block_diagonal(F)`."),
    **_each("trace", "Write `F.trace()`, or `jf.estimate_trace(F, key)` from products alone."),
    **_each("logdet", "Write `F.logdet(damping)`, or `jf.estimate_logdet(F, key, damping)` from products alone."),
    **_each("inverse inv", "Write `jf.solve(F, v, damping)`."),
    **_each("jacobian per_example_grads", "Write `jf.scores(log_prob)(params, x, y)`."),
    **_each("laplace_approximation", "Write `jf.laplace(model, params, x, y, prior=1.0)`."),
    **_each("adam sgd adamw rmsprop adagrad", "Write `optax.adam(1e-3)` and the like; `jf.training_step` takes any of them."),
    "Gaussian": "Write `jf.Normal(loc, scale)`.",
    **_each("DiagonalNormal MultivariateNormalDiag", "Write `jf.Normal(loc, scale)` with a number for each coordinate."),
    **_each("Binomial Multinomial Geometric LogNormal Uniform Weibull HalfNormal InverseGamma Pareto Cauchy", _FOREIGN),
    **_each("MixtureSameFamily Mixture", _FOREIGN),
    "Independent": "A distribution with a batch shape is taken as independent: `jf.Normal(jnp.zeros(3), 1.0)`.",
}
"""Names that the package ``jf`` does not have."""


ROOMS = ("design", "forecasts", "geometry", "plot")
"""The modules that are loaded when they are first named: most programs need none, and ``plot`` needs matplotlib."""


def from_package(name: str) -> ModuleType:
    """The ``__getattr__`` of the package: a room, or an error with what to write instead if the name is known."""
    if name in ROOMS:
        return importlib.import_module(f"jaxfisher.{name}")
    if name in OF_PACKAGE:
        raise AttributeError(f"jaxfisher has no `{name}`. {OF_PACKAGE[name]}", name=name)
    raise AttributeError(f"module 'jaxfisher' has no attribute {name!r}", name=name)
