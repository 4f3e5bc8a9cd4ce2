"""Posteriors against those of laplace-torch, in float64: stored by `tests/references/make_laplace.py`, whose header says how.

Nothing is scaled: the evidence with its constants, its derivative in the prior, covariances of outputs and predictions are
compared as both libraries give them.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close

import jaxfisher as jf

STORED = dict(np.load(pathlib.Path(__file__).parent / "references" / "laplace.npz"))
PRIORS = {"one": 0.9, "layers": {"w0": 0.5, "w1": 3.0}}
NOISE = 0.7


def published(fisher):
    """KFAC as published, and as in laplace-torch: means of ``a a^T`` and ``g g^T``. Ours is scaled to the layer's trace."""
    view = jf.kronecker(fisher)
    blocks = (
        dataclasses.replace(block, outputs=block.outputs / block.unit[:, None, None], unit=jnp.ones_like(block.unit))
        for block in view.form.blocks
    )
    return dataclasses.replace(view, form=dataclasses.replace(view.form, blocks=tuple(blocks)))


WAYS = {
    "full.all": {},
    "kron.all": {"view": published},
    "diag.all": {"view": jf.diagonal},
    "full.last_layer": {"keep": lambda path: "w1" in path},
}


def outputs(params, x):
    return jnp.tanh(x @ params["w0"]) @ params["w1"]


MODELS = {
    "classification": (lambda params, x: jf.Categorical(logits=outputs(params, x)), "labels"),
    "regression": (lambda params, x: jf.Normal(outputs(params, x), jnp.full(2, NOISE)), "targets"),
}


@pytest.mark.parametrize(
    ("likelihood", "way", "prior"),
    [
        ("classification", "full.all", "layers"),
        ("classification", "kron.all", "layers"),
        ("classification", "diag.all", "one"),
        ("classification", "full.last_layer", "one"),
        ("regression", "kron.all", "one"),
    ],
)
def test_evidence_covariances_and_predictions(likelihood, way, prior):
    model, target = MODELS[likelihood]

    def asked(params, x, y, prior):
        posterior = jf.laplace(model, params, x, y, prior=prior, **WAYS[way])
        found = posterior.predictive(x) if likelihood == "classification" else posterior.output_covariance(x)
        return *jax.value_and_grad(posterior.log_evidence)(prior), found

    params = {name: jnp.asarray(STORED[f"{likelihood}.{name}"]) for name in ("w0", "w1")}
    evidence, slope, found = jax.jit(asked)(params, STORED["x"], STORED[target], jax.tree.map(jnp.asarray, PRIORS[prior]))
    ours = {"evidence": evidence, "slope": jnp.stack(jax.tree.leaves(slope))}
    ours |= {"probs": found.probs} if likelihood == "classification" else {"covariance": found}
    for name, value in ours.items():
        assert_close(np.ravel(value), np.ravel(STORED[f"{likelihood}.{way}.{prior}.{name}"]), factor=1e4)
