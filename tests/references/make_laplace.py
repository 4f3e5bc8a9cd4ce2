"""Posteriors of a small PyTorch classifier and a regression by laplace-torch, stored for `tests/test_laplace_torch.py`.

The tests need no PyTorch. To write the file again, in a separate environment::

    python -m venv laplace-env                            # Python 3.11
    laplace-env/bin/pip install torch==2.13.0 numpy==2.4.6 scipy tqdm opt_einsum einops torchmetrics
    laplace-env/bin/pip install --no-deps laplace-torch==0.3 curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1
    laplace-env/bin/pip install --no-deps asdfghjkl==0.1a4 einconv unfoldnd linear_operator jaxtyping wadler_lindig mpmath
    laplace-env/bin/python tests/references/make_laplace.py

asdfghjkl pins an old PyTorch, so its dependencies are left out; it is imported and not used. Everything is float64, and only
NumPy's seeded draws are random. The networks have no biases, since laplace-torch puts them in separate blocks. The values are
those that the library returns.
"""

import pathlib

import numpy as np
import torch
from laplace import Laplace
from laplace.curvature.curvlinops import CurvlinopsGGN
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

HERE = pathlib.Path(__file__).parent
N, INPUTS, HIDDEN, OUTPUTS = 12, 3, 4, 3
PRIORS = {"one": [0.9], "layers": [0.5, 3.0]}
NOISE = 0.7


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def network(outputs):
    model = nn.Sequential(nn.Linear(INPUTS, HIDDEN, bias=False), nn.Tanh(), nn.Linear(HIDDEN, outputs, bias=False))
    for k, layer in enumerate((model[0], model[2])):
        layer.weight.data = torch.tensor(0.7 * drawn(k, *layer.weight.shape))
    return model


def asked(likelihood, structure, subset, model, x, y):
    """Evidence and its derivative in the prior, covariances of outputs, and predictions."""
    noise = {"sigma_noise": NOISE} if likelihood == "regression" else {}
    made = Laplace(model, likelihood, subset_of_weights=subset, hessian_structure=structure, backend=CurvlinopsGGN, **noise)
    made.fit(DataLoader(TensorDataset(x, y), batch_size=N))
    found = {}
    for name, values in PRIORS.items():
        if name == "layers" and (subset == "last_layer"):
            continue
        prior = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        evidence = made.log_marginal_likelihood(prior_precision=prior)
        evidence.backward()
        found[f"{name}.evidence"], found[f"{name}.slope"] = evidence.item(), prior.grad.numpy()
        made.prior_precision = prior.detach()
        if likelihood == "classification":
            found[f"{name}.probs"] = made(x, pred_type="glm", link_approx="probit").detach().numpy()
            found[f"{name}.covariance"] = made._glm_predictive_distribution(x)[1].detach().numpy()
        else:
            mean, covariance = made(x, pred_type="glm")
            found[f"{name}.mean"], found[f"{name}.covariance"] = mean.detach().numpy(), covariance.detach().numpy()
    return found


def main():
    torch.set_default_dtype(torch.float64)
    x = drawn(5, N, INPUTS)
    stored = {"x": x, "labels": np.arange(N) % OUTPUTS, "targets": drawn(6, N, 2)}
    for likelihood, outputs, target in (
        ("classification", OUTPUTS, torch.tensor(stored["labels"])),
        ("regression", 2, torch.tensor(stored["targets"])),
    ):
        model = network(outputs)
        stored |= {f"{likelihood}.w{k}": layer.weight.detach().numpy().T.copy() for k, layer in enumerate((model[0], model[2]))}
        for structure, subset in (("full", "all"), ("kron", "all"), ("diag", "all"), ("full", "last_layer")):
            found = asked(likelihood, structure, subset, network(outputs), torch.tensor(x), target)
            stored |= {f"{likelihood}.{structure}.{subset}.{name}": value for name, value in found.items()}
    np.savez(HERE / "laplace.npz", **stored)


if __name__ == "__main__":
    main()
