"""The 27 certified nonlinear regressions of NIST, read from ``references/nist.txt``, which names its source."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable

import numpy as np

FILE = pathlib.Path(__file__).parent / "references" / "nist.txt"


def chwirut(b, x, m):
    return m.exp(-b[0] * x) / (b[1] + b[2] * x)


def gauss(b, x, m):
    return b[0] * m.exp(-b[1] * x) + b[2] * m.exp(-(((x - b[3]) / b[4]) ** 2)) + b[5] * m.exp(-(((x - b[6]) / b[7]) ** 2))


def lanczos(b, x, m):
    return b[0] * m.exp(-b[1] * x) + b[2] * m.exp(-b[3] * x) + b[4] * m.exp(-b[5] * x)


def cubics(b, x, m):
    return (b[0] + x * (b[1] + x * (b[2] + x * b[3]))) / (1 + x * (b[4] + x * (b[5] + x * b[6])))


def enso(b, x, m):
    def wave(period, cosine, sine):
        return cosine * m.cos(2 * math.pi * x / period) + sine * m.sin(2 * math.pi * x / period)

    return b[0] + wave(12, b[1], b[2]) + wave(b[3], b[4], b[5]) + wave(b[6], b[7], b[8])


MEANS = {
    "Bennett5": lambda b, x, m: b[0] * (b[1] + x) ** (-1 / b[2]),
    "BoxBOD": lambda b, x, m: b[0] * (1 - m.exp(-b[1] * x)),
    "Chwirut1": chwirut,
    "Chwirut2": chwirut,
    "DanWood": lambda b, x, m: b[0] * x ** b[1],
    "ENSO": enso,
    "Eckerle4": lambda b, x, m: b[0] / b[1] * m.exp(-0.5 * ((x - b[2]) / b[1]) ** 2),
    "Gauss1": gauss,
    "Gauss2": gauss,
    "Gauss3": gauss,
    "Hahn1": cubics,
    "Kirby2": lambda b, x, m: (b[0] + x * (b[1] + x * b[2])) / (1 + x * (b[3] + x * b[4])),
    "Lanczos1": lanczos,
    "Lanczos2": lanczos,
    "Lanczos3": lanczos,
    "MGH09": lambda b, x, m: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "MGH10": lambda b, x, m: b[0] * m.exp(b[1] / (x + b[2])),
    "MGH17": lambda b, x, m: b[0] + b[1] * m.exp(-x * b[3]) + b[2] * m.exp(-x * b[4]),
    "Misra1a": lambda b, x, m: b[0] * (1 - m.exp(-b[1] * x)),
    "Misra1b": lambda b, x, m: b[0] * (1 - (1 + b[1] * x / 2) ** -2),
    "Misra1c": lambda b, x, m: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda b, x, m: b[0] * b[1] * x / (1 + b[1] * x),
    "Nelson": lambda b, x, m: b[0] - b[1] * x[0] * m.exp(-b[2] * x[1]),
    "Rat42": lambda b, x, m: b[0] / (1 + m.exp(b[1] - b[2] * x)),
    "Rat43": lambda b, x, m: b[0] / (1 + m.exp(b[1] - b[2] * x)) ** (1 / b[3]),
    "Roszman1": lambda b, x, m: b[0] - b[1] * x - m.arctan(b[2] / (x - b[3])) / math.pi,
    "Thurber": cubics,
}
"""The mean functions, of NumPy or of JAX's copy of it. Of `Nelson` it is the logarithm of the target."""


@dataclasses.dataclass(frozen=True)
class Certified:
    """A data set, its mean function, and the certified results."""

    x: np.ndarray
    """Shape ``[n]``; of two predictors ``[2, n]``."""
    y: np.ndarray
    mean: Callable
    starts: np.ndarray
    estimates: np.ndarray
    errors: np.ndarray
    deviation: float


@functools.cache
def sets():
    """All sets by name."""
    lines = iter(line for line in FILE.read_text().splitlines() if not line.startswith("#"))
    read = {}
    for head in lines:
        name, _, n, deviation = head.split()
        first, second, estimates, errors = (np.array(next(lines).split(), float) for _ in range(4))
        y, *x = np.array([next(lines).split() for _ in range(int(n))], float).T
        y = np.log(y) if name == "Nelson" else y
        x = x[0] if len(x) == 1 else np.stack(x)
        read[name] = Certified(x, y, MEANS[name], np.stack([first, second]), estimates, errors, float(deviation))
    return read
