"""What a job costs beside the library that people use for it, or beside plain JAX: see README.md beside this file.

python benchmarks/jobs.py [--check] [job ...]

A job is a file ``job_NAME.py`` beside this one, with a function ``rows`` that takes the sizes and gives the lines of its table.
"""

from __future__ import annotations

# The first import: it settles the threads of BLAS, which must be known before NumPy and JAX load it.
from engine import quick_check, timed_head, workload_parser

# isort: split

import importlib
import pathlib

JOBS = {
    path.stem.removeprefix("job_"): importlib.import_module(path.stem).rows
    for path in sorted(pathlib.Path(__file__).parent.glob("job_*.py"))
}


def main() -> None:
    """Measure what was asked for, or everything."""
    quick_check(workload_parser(__doc__, JOBS), JOBS, timed_head)


if __name__ == "__main__":
    main()
