"""Curvature matrices of small PyTorch models by curvlinops and nngeometry, stored for `tests/test_neighbours.py`.

The tests need no PyTorch. To write the files again, in a separate environment::

    python -m venv torch-env                              # Python 3.11
    torch-env/bin/pip install torch==2.13.0 numpy==2.4.6 curvlinops-for-pytorch==3.0.1 nngeometry==0.4
    torch-env/bin/python tests/references/make.py

Those are the versions that wrote the files here (torch as its CPU build). Everything is float64, and only NumPy's seeded draws
are random, so the files are reproduced up to rounding.

The files have the libraries' own scales and layouts, and the tests state how these relate to ours. Weights are ``[out, in]``;
matrices are over ``weight_1, bias_1, weight_2, bias_2``, each flattened row by row.
"""

import pathlib

import curvlinops
import nngeometry.metrics
import nngeometry.object
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

HERE = pathlib.Path(__file__).parent
N, INPUTS, HIDDEN, CLASSES, TARGETS, POSITIONS = 6, 3, 3, 3, 2, 4


class Shared(nn.Module):
    """A softmax classifier of sequences: the first layer is shared by the positions, which are then averaged."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).mean(1))


def mlp(outputs):
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, outputs))


def with_values(model, rng):
    """The model with fixed weights in place of PyTorch's random ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=tuple(parameter.shape))))
    return model


def softmax_problem():
    rng = np.random.default_rng(1)
    model = with_values(mlp(CLASSES), rng)
    return model, torch.from_numpy(rng.normal(size=(N, INPUTS))), torch.from_numpy(rng.integers(0, CLASSES, N))


def gaussian_problem():
    rng = np.random.default_rng(2)
    model = with_values(mlp(TARGETS), rng)
    return model, torch.from_numpy(rng.normal(size=(N, INPUTS))), torch.from_numpy(rng.normal(size=(N, TARGETS)))


def shared_problem():
    rng = np.random.default_rng(3)
    model = with_values(Shared(), rng)
    x = torch.from_numpy(rng.normal(size=(N, POSITIONS, INPUTS)))
    return model, x, torch.from_numpy(rng.integers(0, CLASSES, N))


def from_curvlinops(problem, loss):
    """The matrices of one problem, by the names that the tests use."""
    model, x, y = problem
    params = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in params)

    def dense(operator, **options):
        made = operator(model, loss, params, [(x, y)], **options)
        return (made @ torch.eye(size)).detach().numpy()

    # One block for a layer's weight and bias, as in the papers; the library's default separates them.
    joint = {"separate_weight_and_bias": False}
    kfac, ekfac = curvlinops.KFACLinearOperator, curvlinops.EKFACLinearOperator
    exact, empirical = curvlinops.FisherType.TYPE2, curvlinops.FisherType.EMPIRICAL
    return {
        "ggn": dense(curvlinops.GGNLinearOperator),
        "empirical": dense(curvlinops.EFLinearOperator),
        "kfac_expand": dense(kfac, fisher_type=exact, kfac_approx=curvlinops.KFACType.EXPAND, **joint),
        "kfac_reduce": dense(kfac, fisher_type=exact, kfac_approx=curvlinops.KFACType.REDUCE, **joint),
        "kfac_empirical": dense(kfac, fisher_type=empirical, **joint),
        "ekfac": dense(ekfac, fisher_type=exact, **joint),
    }


def from_nngeometry(problem, variant):
    """The matrices of one problem in each of the library's representations."""
    model, x, y = problem
    loader = DataLoader(TensorDataset(x, y), batch_size=N)

    def fisher(representation):
        return nngeometry.metrics.FIM(model, loader, representation, variant=variant)

    ekfac = fisher(nngeometry.object.PMatEKFAC)
    ekfac.update_diag(loader)  # before this the eigenvalues are KFAC's
    return {
        "fim": fisher(nngeometry.object.PMatDense).to_torch().numpy(),
        "diagonal": fisher(nngeometry.object.PMatDiag).get_diag().numpy(),
        "block_diagonal": fisher(nngeometry.object.PMatBlockDiag).to_torch().numpy(),
        "kfac": fisher(nngeometry.object.PMatKFAC).to_torch().numpy(),
        "ekfac": ekfac.to_torch().numpy(),
    }


def store(name, problem, **sources):
    """Write one file per problem: its arrays, and each source's matrices under ``source_name``."""
    model, x, y = problem
    names = ("weight_1", "bias_1", "weight_2", "bias_2")
    arrays = {name: p.detach().numpy() for name, p in zip(names, model.parameters(), strict=True)}
    arrays |= {f"{source}_{name}": matrix for source, matrices in sources.items() for name, matrix in matrices.items()}
    np.savez_compressed(HERE / f"{name}.npz", x=x.numpy(), y=y.numpy(), **arrays)


def main():
    # nngeometry makes constants in the default dtype.
    torch.set_default_dtype(torch.float64)
    softmax, gaussian, shared = softmax_problem(), gaussian_problem(), shared_problem()
    cross_entropy, mse_mean, mse_sum = nn.CrossEntropyLoss(), nn.MSELoss(), nn.MSELoss(reduction="sum")
    store(
        "softmax",
        softmax,
        curvlinops=from_curvlinops(softmax, cross_entropy),
        nngeometry=from_nngeometry(softmax, "classif_logits"),
    )
    store(
        "gaussian",
        gaussian,
        curvlinops_mean=from_curvlinops(gaussian, mse_mean),
        curvlinops_sum=from_curvlinops(gaussian, mse_sum),
        nngeometry=from_nngeometry(gaussian, "regression"),
    )
    # nngeometry has no layers shared by positions.
    store("shared", shared, curvlinops=from_curvlinops(shared, cross_entropy))


if __name__ == "__main__":
    main()
