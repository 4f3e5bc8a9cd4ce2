"""Every public function and method in a call on tiny data, for laws that hold of all of them."""

import functools

import jax
import jax.numpy as jnp
from rooms import ROOMS, candidates, covariance, information, observed

import jaxfisher as jf


def model(params, x):
    """A softmax over one layer."""
    return jf.Categorical(logits=x @ params["w"] + params["b"])


LOG_PROB = jf.log_likelihood(model)


@functools.cache
def problem():
    """Parameters, six of them, three examples, and a vector."""
    params = {"w": jnp.array([[0.5, -0.3], [0.2, 0.7]]), "b": jnp.array([0.1, -0.2])}
    return params, jnp.array([[0.3, 1.0], [-0.7, 0.4], [1.2, -0.5]]), jnp.array([0, 1, 1])


def log_psi(params, x):
    """A complex amplitude of one layer of complex weights."""
    return jnp.sum(jnp.log(jnp.cosh(x.astype(params["w"].dtype) @ params["w"] + params["b"])))


def wave():
    """Complex parameters and configurations."""
    params, x, _ = problem()
    return jax.tree.map(lambda leaf: jax.lax.complex(leaf, 0.3 * leaf), params), x


def vector():
    return jax.tree.map(lambda leaf: leaf + 1, problem()[0])


def loss(params):
    _, x, y = problem()
    return -jnp.mean(jax.vmap(LOG_PROB, (None, 0, 0))(params, x, y))


def exact(params, x, y=None):
    del y
    return jf.exact_fisher(model)(params, x)


@functools.cache
def fisher(form="scores"):
    params, x, y = problem()
    make = {
        "scores": lambda: jf.empirical_fisher(LOG_PROB)(params, x, y),
        "exact": lambda: jf.exact_fisher(model)(params, x),
        "streamed": lambda: jf.empirical_fisher(LOG_PROB, batch_size=2)(params, x, y),
        "sum": lambda: jf.dense(fisher()) + jf.implicit_fisher(model, batch_size=2)(params, x),
        "Kronecker": lambda: jf.kronecker(fisher()),
        "low rank": lambda: jf.low_rank(fisher(), 2),
    }
    return make[form]()


METHODS = {
    "mv": lambda F: F.mv(vector()),
    "quadratic": lambda F: F.quadratic(vector()),
    "solve": lambda F: F.solve(vector(), 0.1),
    "power_mv": lambda F: F.power_mv(vector(), 0.3, 0.1),
    "sqrt_mv": lambda F: F.sqrt_mv(vector(), 0.1),
    "inv_sqrt_mv": lambda F: F.inv_sqrt_mv(vector(), 0.1),
    "as_matrix": lambda F: F.as_matrix(),
    "diagonal": lambda F: F.diagonal(),
    "trace": lambda F: F.trace(),
    "eigvalsh": lambda F: F.eigvalsh(),
    "logdet": lambda F: F.logdet(0.1),
    "frobenius_norm": lambda F: F.frobenius_norm(),
    "rank": lambda F: F.rank(),
    "null_space": lambda F: F.null_space(),
    "restrict": lambda F: F.restrict(lambda path: "w" in path).diagonal(),
    "marginal": lambda F: F.marginal(lambda path: "w" in path).form.matrix,
}


def natural(*args, **options):
    params, *data = problem()
    return jf.natural_grad(LOG_PROB, *args, damping=0.1, **options)(params, *data)


def stepped(opt):
    """The second update of an optimiser, with every keyword that one may need."""
    params = problem()[0]
    given = {"value_fn": loss, "kl_fn": lambda new: jf.kl(model)(params, new, problem()[1]), "grad": vector()}
    given["acceleration_fn"] = lambda d: jf.acceleration(model)(params, d, problem()[1])
    state = opt.init(params)
    for _ in range(2):
        updates, state = opt.update(vector(), state, params, fisher=fisher("exact"), **given)
    return updates, state


SCORES = {
    "mv": lambda s: s.mv(vector()),
    "rmv": lambda s: s.rmv(s.weights),
    "gram": lambda s: s.gram(),
    "squared_norms": lambda s: s.squared_norms(),
    "clipped_sum": lambda s: s.clipped_sum(0.5),
    "diagonal": lambda s: s.diagonal(),
    "second_moment": lambda s: s.second_moment(),
    "cross_gram": lambda s: (s.cross_gram(scores(None)), s.cross_gram(stacked())),
    "as_matrix": lambda s: s.as_matrix(),
}


@functools.cache
def scores(batch_size):
    params, *data = problem()
    return jf.scores(LOG_PROB, batch_size=batch_size)(params, *data)


def outputs(params, x):
    return model(params, x).logits


def squares(z, y):
    return jnp.sum(jnp.square(z - y.astype(z.dtype)))


FISHERS = {
    "empirical_fisher": lambda: jf.empirical_fisher(LOG_PROB)(*problem()),
    "exact_fisher": lambda: exact(*problem()),
    "sampled_fisher": lambda: jf.sampled_fisher(model)(problem()[0], key(), problem()[1]),
    "empirical_fisher, centred": lambda: jf.empirical_fisher(LOG_PROB, center=True)(*problem()),
    "fisher_from_scores": lambda: jf.fisher_from_scores(scores(2)),
    "implicit_fisher": lambda: jf.implicit_fisher(model)(problem()[0], problem()[1]),
    "exact_fisher, over counts": lambda: jf.exact_fisher(model)(*problem()[:2], counts=jnp.array([2, 1, 3])),
    "kl_hessian": lambda: jf.kl_hessian(model)(*problem()[:2]),
    "observed_information": lambda: jf.observed_information(LOG_PROB)(*problem()),
    "gauss_newton": lambda: jf.gauss_newton(outputs, squares)(*problem()),
    "block_diagonal": lambda: jf.block_diagonal(fisher()),
    "dense": lambda: jf.dense(fisher("streamed")),
    "from_matrix": lambda: jf.from_matrix(jnp.eye(6), fisher()),
    "covariance": lambda: jf.covariance(fisher("exact")),
    "sandwich": lambda: jf.sandwich(fisher("exact"), fisher()),
    "diagonal": lambda: jf.diagonal(fisher("streamed")),
    "kronecker": lambda: jf.kronecker(fisher("streamed")),
    "kronecker_reduce": lambda: jf.kronecker_reduce(fisher()),
    "eigen_kronecker": lambda: jf.eigen_kronecker(fisher("streamed"), basis=fisher("Kronecker")),
    "kronecker, of a sum": lambda: jf.kronecker(fisher("sum") + jf.scaled_identity(fisher(), 2.0)),
    "eigen_kronecker, of a sum": lambda: jf.eigen_kronecker(fisher("sum") + 2 * fisher("streamed")),
    "low_rank": lambda: jf.low_rank(fisher(), 2),
    "nystrom": lambda: jf.nystrom(fisher(), key(), 2),
    "partial_cholesky": lambda: jf.partial_cholesky(fisher(), 2),
    "sketch": lambda: jf.merge(jf.sketch(fisher(), 2), jf.sketch(fisher(), 2)),
    "spread_solves": lambda: jf.spread_solves(fisher(), mesh(), "rows").solve(problem()[0], 0.1),
    "marginal": lambda: jf.marginal(fisher(), lambda path: "w" in path),
    "scaled_identity": lambda: jf.scaled_identity(fisher(), 2.0),
    "accumulate": lambda: accumulated(problem()[0], 2 * [(problem()[1],)]),
    "merge": lambda: jf.merge(fisher("Kronecker"), fisher("Kronecker")),
}


accumulated = jf.accumulate(jf.exact_fisher(model), jf.kronecker)


RESIDUALS = jf.residuals({"outputs": outputs, "bias": lambda params: params["b"]})


def points():
    return {"outputs": problem()[1], "bias": ()}


def mesh():
    return jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))


def key():
    return jax.random.key(4)


NUMBERS = {
    "natural_grad": natural,
    "natural_grad, of a Fisher": lambda: natural(exact),
    "natural_grad, in pieces": lambda: natural(batch_size=2),
    "value_and_natural_grad": lambda: jf.value_and_natural_grad(LOG_PROB, damping=0.1)(*problem()),
    "laplace": lambda: jf.laplace(model, *problem(), prior=0.5, view=jf.kronecker).log_evidence(),
    "laplace, precision": lambda: posterior().precision().diagonal(),
    "laplace, sample": lambda: posterior().sample(key(), (2,)),
    "laplace, predictive": lambda: posterior().predictive(problem()[1]),
    "laplace, sample_predictive": lambda: posterior().sample_predictive(key(), problem()[1], num_samples=2),
    "tune_prior": lambda: jf.tune_prior(posterior()),
    "clipped_grad": lambda: jf.clipped_grad(LOG_PROB, 0.5)(*problem(), weights=jnp.array([1.0, 0.0, 1.0])),
    "acceleration": lambda: jf.acceleration(model)(problem()[0], vector(), problem()[1]),
    "residuals, loss": lambda: RESIDUALS.loss(problem()[0], points(), {"bias": 0.5}),
    "residuals, gauss_newton": lambda: RESIDUALS.gauss_newton(problem()[0], points(), {"bias": 0.5}).diagonal(),
    "residuals, acceleration": lambda: RESIDUALS.acceleration(problem()[0], vector(), points()),
    "residuals, kl": lambda: RESIDUALS.kl(problem()[0], vector(), points()),
    "energy_gradient": lambda: jf.energy_gradient(LOG_PROB)(*problem(), jnp.array([1.0, -0.5, 0.2])),
    "energy_gradient, complex": lambda: jf.energy_gradient(log_psi)(*wave(), jnp.array([1.0, -0.5, 0.2])),
    "scores, complex": lambda: jf.scores(log_psi, center=True)(*wave()).rmv(jnp.ones(6)),
    "empirical_fisher, complex": lambda: jf.empirical_fisher(log_psi, center=True)(*wave()).solve(wave()[0], 0.1),
    "log_likelihood": lambda: LOG_PROB(problem()[0], problem()[1][0], problem()[2][0]),
    "scores": lambda: jf.scores(LOG_PROB, center=True)(*problem()),
    "kl": lambda: jf.kl(model)(problem()[0], vector(), problem()[1]),
    "kl_divergence": lambda: jf.kl_divergence(jf.Normal(0.0, 1.0), jf.Normal(1.0, 1.0)),
    "monte_carlo_kl": lambda: jf.monte_carlo_kl(LOG_PROB)(problem()[0], vector(), problem()[1:]),
    "effective_dimension": lambda: jf.effective_dimension(fisher(), 0.1),
    "spectrum": lambda: jf.spectrum(fisher()),
    "relative_damping": lambda: jf.relative_damping(fisher(), 0.1),
    "estimate_trace": lambda: jf.estimate_trace(fisher(), key()),
    "estimate_diagonal": lambda: jf.estimate_diagonal(fisher(), key()),
    "estimate_logdet": lambda: jf.estimate_logdet(fisher(), key(), 0.1),
    "spectral_density": lambda: jf.spectral_density(fisher(), key(), jnp.ones(2), width=0.5),
    "solve": lambda: jf.solve(fisher(), vector(), 0.1),
    "solve, many right-hand sides": lambda: jax.vmap(lambda v: fisher().solve(v, 0.1))(stacked()),
    "least_squares": lambda: jf.least_squares(fisher().form.scores, jnp.ones(3), 0.1),
    "solve_path": lambda: jf.solve_path(fisher(), vector(), jnp.array([0.1, 1.0])),
    "Cholesky": lambda: jf.solve(fisher(), vector(), 0.1, jf.Cholesky(rtol=1e-3)),
    "CG": lambda: jf.solve(fisher(), vector(), 0.1, jf.CG()),
    "CG, by a view": lambda: jf.solve(fisher("sum"), vector(), 0.1, jf.CG(preconditioner=lambda F: jf.diagonal(F))),
    "LSMR": lambda: jf.solve(fisher("streamed"), vector(), 0.1, jf.LSMR()),
    "LSMR, least squares": lambda: jf.LSMR().least_squares(scores(None), scores(None).weights, 0.1),
    "influence": lambda: jf.influence(LOG_PROB, fisher("Kronecker"))(problem()[0], problem()[1:], problem()[1:], 0.1),
    "self_influence": lambda: jf.self_influence(LOG_PROB, fisher("Kronecker"))(problem()[0], problem()[1:], 0.1),
    "tracin": lambda: jf.tracin(LOG_PROB, batch_size=2)([problem()[0], vector()], problem()[1:], problem()[1:], [0.1, 0.2]),
    "ewc_penalty": lambda: jax.value_and_grad(jf.ewc_penalty(fisher("Kronecker"), problem()[0], 2.0))(vector()),
    "fisher_average": lambda: jf.fisher_average(2 * [problem()[0]], 2 * [fisher("Kronecker")], 0.1, view=jf.kronecker),
    "factored_solve": lambda: jf.solve(fisher("Kronecker"), vector(), 0.1, jf.factored_solve),
}
OPTIMISERS = {
    "scale_by_fisher": lambda: jf.scale_by_fisher(0.1, momentum=0.5),
    "scale_by_fisher, a power": lambda: jf.scale_by_fisher(0.1, power=jnp.asarray(0.5), view=jf.diagonal, decay=0.5),
    "scale_to_kl": lambda: jf.scale_to_kl(0.1),
    "natural_gradient": lambda: jf.natural_gradient(0.1, 0.1, view=jf.kronecker, update_every=2, like=fisher("exact")),
    "backtrack_kl": lambda: jf.backtrack_kl(0.1),
    "adapt_damping": lambda: jf.adapt_damping(jf.natural_gradient(0.1, 0.1), 0.1),
    "levenberg_marquardt": lambda: jf.levenberg_marquardt(jf.natural_gradient(0.1), 0.1),
    "geodesic_acceleration": lambda: jf.geodesic_acceleration(0.1),
    "quadratic_model": lambda: jf.quadratic_model(0.1),
    "kfac": lambda: jf.kfac(fisher("exact")),
}


@functools.cache
def posterior():
    return jf.laplace(model, *problem(), prior=1.0)


def stacked():
    return jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), vector())


def trained(opt=None):
    params, *data = problem()
    opt = jf.natural_gradient(0.1, 0.1) if opt is None else opt
    return jf.training_step(model, opt)(params, opt.init(params), *data)


def noisy(params, x, k):
    return model(params, x * jax.random.uniform(k, x.shape))


def noisy_loss(params, x, keys, y):
    values, aux = jax.vmap(lambda x, k, y: (noisy(params, x, k).log_prob(y), x))(x, keys, y)
    return -jnp.mean(values), aux


def trained_with_a_loss():
    params, *data = problem()
    opt = jf.natural_gradient(0.1, 0.1)
    return jf.training_step(noisy, opt, loss=noisy_loss, has_aux=True)(params, opt.init(params), *data, key=key())


DISTRIBUTIONS = {
    "Normal": lambda: jf.Normal(0.3, 1.2),
    "MultivariateNormal": lambda: jf.MultivariateNormal(jnp.zeros(2), jnp.eye(2)),
    "Laplace": lambda: jf.Laplace(0.3, 1.2),
    "StudentT": lambda: jf.StudentT(4.0, 0.3, 1.2),
    "Gamma": lambda: jf.Gamma(1.3, 2.0),
    "Beta": lambda: jf.Beta(1.3, 2.0),
    "Exponential": lambda: jf.Exponential(0.3),
    "Bernoulli": lambda: jf.Bernoulli(0.3),
    "Poisson": lambda: jf.Poisson(0.3),
    "Categorical": lambda: jf.Categorical(jnp.array([0.3, 0.1])),
    "Joint": lambda: jf.Joint({"label": jf.Categorical(jnp.array([0.3, 0.1])), "number": jf.Normal(0.3, 1.2)}),
}
"""Families that compile fast; the others take long, and consist of the same functions."""


def asked(make):
    """All that a distribution computes for one of its draws."""
    p = make()
    x = p.sample(key())
    entropy = () if isinstance(p, jf.Poisson) else (p.entropy(),)
    about = p.log_prob(x), jax.grad(lambda p: p.log_prob(x))(p), p.kl(make()), p.mean, p.variance, p.mode, *entropy
    about += (p.covariance,) if isinstance(p, jf.MultivariateNormal) else ()
    return about, p.fisher_matrix(), p.fisher_mv(p), p.fisher_sqrt_mv(p.fisher_noise())


OTHERS = {
    "training_step": lambda: trained(),
    "training_step of a loss": trained_with_a_loss,
    "training_step of kfac": lambda: trained(jf.kfac(fisher("exact"))),
    "check_fisher": lambda: jf.check_fisher(model, num_samples=20)(problem()[0], key(), problem()[1]).passed,
    "check_laws": lambda: jf.check_laws(fisher("exact"), key=key()).passed,
    "check_laws of a family": lambda: jf.check_laws(jf.Bernoulli(logits=jnp.array([0.3, -0.5])), key=key()).passed,
    "fisher_for": lambda: jf.fisher_for(vector(), fisher, "a transformation").diagonal(),
    "explain": lambda: jf.explain(model)(*problem()[:2]).bytes,
    "layers": lambda: jax.tree.map(len, jf.layers(fisher())),
    "as_lineax": lambda: jf.as_lineax(fisher()).mv(vector()),
    "standard_errors": lambda: jf.standard_errors(fisher("exact") + jf.scaled_identity(fisher("exact"), 1.0)),
    "fit": lambda: jf.fit(model, max_steps=2)(*problem()).log_likelihood,
    "solve of blocks": lambda: jf.block_diagonal(fisher()).solve(vector(), 0.1),
    "solve without damping": lambda: [fisher(form).solve(vector(), 0.0) for form in ("scores", "Kronecker")],
    "scores with padding": lambda: jf.scores(LOG_PROB, center=True)(*problem(), weights=jnp.array([1.0, 0.0, 2.0])).gram(),
}


def everything(forms=("scores", "sum", "Kronecker")):
    """All calls above, by name. The objects that they share are made anew before, so that a flag affects only the calls."""
    for shared in (fisher, scores, problem, posterior, observed, information, covariance, candidates):
        shared.cache_clear()
    covariance(), candidates()
    for form in ("scores", "exact", "streamed", "sum", "Kronecker", "low rank"):
        fisher(form)
    scores(None), scores(2), posterior()
    made = {(name, form): lambda c=c, f=form: c(fisher(f)) for name, c in METHODS.items() for form in forms}
    made |= {(name, size): lambda c=c, size=size: c(scores(size)) for name, c in SCORES.items() for size in (None, 2)}
    made |= FISHERS | NUMBERS | OTHERS | ROOMS
    made |= {name: lambda make=make: stepped(make()) for name, make in OPTIMISERS.items()}
    return made | {name: lambda make=make: asked(make) for name, make in DISTRIBUTIONS.items()}
