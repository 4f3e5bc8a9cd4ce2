"""Random programs for any length of time: ``python tests/random_programs.py --seconds 600 --seed 1000 --jobs 2``.

Prints every failure with its seed, its faults and a reduced program, and at the end how many programs ran, were skipped (JAX
cannot differentiate them, or the gradients are not finite), were wrong and crashed. The exit code is 1 if there was a failure.
One program again: ``python tests/random_programs.py --seed 1234 --seconds 0``.
"""

import argparse
import collections
import os
import subprocess
import sys
import time
import warnings

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import programs
from programs.compare import WAYS, Skipped, compare
from programs.reduce import reduced

FORGET = 100
"""The number of programs after which JAX's caches are cleared."""


def failure(seed, ways=None, program=None):
    """``(program, faults)`` of this seed. A fault counts only if it also occurs with other numbers. Raises `Skipped`."""
    program = program or programs.write(seed)
    faults = compare(program, ways=ways)
    if faults:
        # At a tie or a kink, rounding may decide either way.
        again = [compare(program, draw, ways) for draw in (1, 2)]
        faults = faults if all(again) else []
    return program, faults


def run(seconds, seed, stride=1, ways=None, reduce_for=60.0):
    """Run the program of every ``stride``-th seed from ``seed`` on for ``seconds``, at least one. Returns counts."""
    counts, deadline = collections.Counter(), time.monotonic() + seconds
    while not counts or time.monotonic() < deadline:
        if sum(counts.values()) % FORGET == FORGET - 1:
            jax.clear_caches()
        try:
            program, faults = failure(seed, ways)
        except Skipped:
            counts["skipped"] += 1
        else:
            counts["ran"] += 1
            if faults:
                counts["crashed" if faults[0].kind == "crashed" else "wrong"] += 1
                _report(program, faults, reduce_for)
        seed += stride
    return counts


def _report(program, faults, reduce_for):
    print(f"\nseed {program.seed}:", *faults, sep="\n    ")
    print(program)
    if reduce_for:
        print("# reduced:")
        print(reduced(program, faults, reduce_for))
    sys.stdout.flush()


def _jobs(arguments):
    """`run` in several processes, which share the seeds. Returns the sum of their counts."""
    own = [*sys.argv[1:], "--jobs", "1", "--stride", str(arguments.jobs)]
    workers = [
        subprocess.Popen([sys.executable, __file__, *own, "--seed", str(arguments.seed + k)], stdout=subprocess.PIPE, text=True)
        for k in range(arguments.jobs)
    ]
    counts = collections.Counter()
    for worker in workers:
        text, _ = worker.communicate()
        *lines, last = text.splitlines() or [""]
        print("\n".join(lines))
        if worker.returncode not in (0, 1) or "ran" not in last:
            raise SystemExit(f"a worker ended with code {worker.returncode}: {last}")
        counts.update({words[1]: int(words[0]) for words in (part.split() for part in last.split(", "))})
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--stride", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--all-ways", action="store_true", help=f"every program in every way: {', '.join(WAYS)}")
    parser.add_argument("--reduce", type=float, default=60.0, help="seconds to make a failing program smaller; 0 for none")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    if arguments.jobs > 1:
        counts = _jobs(arguments)
    else:
        ways = WAYS if arguments.all_ways else None
        counts = run(arguments.seconds, arguments.seed, arguments.stride, ways, arguments.reduce)
    print(", ".join(f"{counts[name]} {name}" for name in ("ran", "skipped", "wrong", "crashed")))
    raise SystemExit(1 if counts["wrong"] or counts["crashed"] else 0)


if __name__ == "__main__":
    main()
