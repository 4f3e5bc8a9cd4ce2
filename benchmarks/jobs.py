"""The cost of each job, against the library that people use for it or against plain JAX: see README.md beside this file.

python benchmarks/jobs.py [--check] [job ...]

A job is a file ``job_NAME.py`` beside this one, with a function ``rows`` that takes the sizes and gives the lines of its table.
"""

from __future__ import annotations

# This import comes first: it sets the number of BLAS threads, which NumPy and JAX read when they load BLAS.
from engine import quick_check, timed_head, workload_parser

# isort: split

import importlib
import pathlib

JOBS = {
    path.stem.removeprefix("job_"): importlib.import_module(path.stem).rows
    for path in sorted(pathlib.Path(__file__).parent.glob("job_*.py"))
}


def main() -> None:
    """Measure the jobs given on the command line, or all of them."""
    quick_check(workload_parser(__doc__, JOBS), JOBS, timed_head)


if __name__ == "__main__":
    main()
