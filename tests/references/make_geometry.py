"""Fisher-Rao distances by geomstats, stored for `tests/test_fisher_rao.py`.

The tests need no geomstats. To write the file again, in a separate environment::

    python -m venv geomstats-env                          # Python 3.11
    geomstats-env/bin/pip install geomstats==2.8.0 "numpy<2"
    geomstats-env/bin/python tests/references/make_geometry.py

That is the version that wrote the file here. It has only distances that geomstats computes in closed form, and only NumPy's
seeded draws are random. The values are those that the library returns; the tests state its parameters and its scale.
"""

import pathlib

import numpy as np
from geomstats.geometry.spd_matrices import SPDMatrices
from geomstats.information_geometry.binomial import BinomialDistributions
from geomstats.information_geometry.categorical import CategoricalDistributions
from geomstats.information_geometry.exponential import ExponentialDistributions
from geomstats.information_geometry.normal import UnivariateNormalDistributions
from geomstats.information_geometry.poisson import PoissonDistributions

HERE = pathlib.Path(__file__).parent
PAIRS = 5


def main():
    rng = np.random.default_rng(7)
    points = {
        "normal": np.stack([rng.normal(size=(2, PAIRS)), rng.uniform(0.3, 3.0, (2, PAIRS))], -1),
        "bernoulli": rng.uniform(0.02, 0.98, (2, PAIRS, 1)),
        "categorical": rng.dirichlet(np.ones(4), (2, PAIRS)),
        "exponential": rng.uniform(0.2, 5.0, (2, PAIRS, 1)),
        "poisson": rng.uniform(0.2, 9.0, (2, PAIRS, 1)),
    }
    spaces = {
        "normal": UnivariateNormalDistributions(),
        "bernoulli": BinomialDistributions(n_draws=1),
        "categorical": CategoricalDistributions(dim=3),
        "exponential": ExponentialDistributions(),
        "poisson": PoissonDistributions(),
    }
    arrays = {f"{name}_points": pair for name, pair in points.items()}
    arrays |= {f"{name}_distances": np.ravel(space.metric.dist(*points[name])) for name, space in spaces.items()}
    roots = rng.normal(size=(2, PAIRS, 3, 3)) + 2 * np.eye(3)
    covariances = roots @ np.swapaxes(roots, -1, -2)
    arrays["covariance_points"] = covariances
    arrays["covariance_distances"] = np.ravel(SPDMatrices(3).metric.dist(*covariances))
    for name, array in arrays.items():
        print(name, array.shape, array if name.endswith("distances") else "")
    np.savez_compressed(HERE / "geometry.npz", **arrays)


if __name__ == "__main__":
    main()
