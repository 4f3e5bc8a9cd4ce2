"""A sample of the random solves in `random_solves.py`, in every form: no inaccurate solution may report convergence."""

import numpy as np
import pytest
import random_solves

SAMPLE = [
    ("tall", "scores", "float32"),
    ("short", "scores", "float32"),
    ("tall", "scores", "float32", "cholesky"),
    ("short", "scores", "float64", "cholesky, as training needs"),
    ("square", "dense", "float32", "cholesky"),
    ("square", "dense", "float64"),
    ("tall", "diagonal", "float32"),
    ("tall", "kronecker", "float64"),
    ("tall", "eigen-Kronecker", "float32"),
    ("short", "low rank", "float64"),
    ("short", "blocks", "float64"),
]
"""Only some of the combinations, since each needs its own program. `python tests/random_solves.py` runs all of them."""


@pytest.mark.parametrize("case", SAMPLE, ids=" ".join)
def test_no_solve_is_converged_and_wrong(case):
    shape, form, dtype, solver = (*case, "exact")[:4]
    (found,) = random_solves.groups(60, 5, (shape,), (dtype,), ((form, solver),))
    verdicts = list(random_solves.verdicts(*found[1:]))
    wrong = [random_solves.described(*pair) for pair in verdicts if pair[1].wrong]
    assert not wrong, "\n".join(wrong)
    # Half of the condition numbers are larger than one over the dtype's rounding error.
    assert np.mean([verdict.converged for _, verdict in verdicts]) > 0.25
