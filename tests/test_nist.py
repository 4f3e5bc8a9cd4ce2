"""Standard errors of NIST's certified nonlinear regressions, in the units of their own parameters.

Data and certified values are of the Statistical Reference Datasets (public domain). The sets that stand here were fitted anew
in arithmetic of 40 digits, which gave all eleven digits of the certified estimates and standard errors; those of more than 35
points are not here. Estimates are refined first: with eleven digits of them, standard errors have nine at the most.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfisher as jf


@dataclasses.dataclass(frozen=True)
class Certified:
    """A data set, its mean function (of numpy's or JAX's ``exp``), and what is certified of it."""

    x: np.ndarray
    y: np.ndarray
    mean: Callable
    estimates: np.ndarray
    errors: np.ndarray


def certified(x, y, mean, estimates, errors):
    numbers = (np.array(words.split(), float) if isinstance(words, str) else np.asarray(words, float) for words in (x, y))
    return Certified(*numbers, mean, *(np.array(words.split(), float) for words in (estimates, errors)))


MISRA = (
    "77.6 114.9 141.1 190.8 239.9 289.0 332.8 378.4 434.8 477.3 536.8 593.1 689.1 760.0",
    "10.07 14.73 17.94 23.93 29.61 35.18 40.02 44.82 50.76 55.05 61.01 66.40 75.47 81.78",
)
SETS = {
    "Misra1a": certified(
        *MISRA,
        lambda b, x, exp: b[0] * (1 - exp(-b[1] * x)),
        "2.3894212918E+02 5.5015643181E-04",
        "2.7070075241E+00 7.2668688436E-06",
    ),
    "Misra1b": certified(
        *MISRA,
        lambda b, x, exp: b[0] * (1 - (1 + b[1] * x / 2) ** -2),
        "3.3799746163E+02 3.9039091287E-04",
        "3.1643950207E+00 4.2547321834E-06",
    ),
    "Misra1c": certified(
        *MISRA,
        lambda b, x, exp: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
        "6.3642725809E+02 2.0813627256E-04",
        "4.6638326572E+00 1.7728423155E-06",
    ),
    "Misra1d": certified(
        *MISRA,
        lambda b, x, exp: b[0] * b[1] * x / (1 + b[1] * x),
        "4.3736970754E+02 3.0227324449E-04",
        "3.6489174345E+00 2.9334354479E-06",
    ),
    "DanWood": certified(
        "1.309 1.471 1.490 1.565 1.611 1.680",
        "2.138 3.421 3.597 4.340 4.882 5.660",
        lambda b, x, exp: b[0] * x ** b[1],
        "7.6886226176E-01 3.8604055871E+00",
        "1.8281973860E-02 5.1726610913E-02",
    ),
    "BoxBOD": certified(
        "1 2 3 5 7 10",
        "109 149 149 191 213 224",
        lambda b, x, exp: b[0] * (1 - exp(-b[1] * x)),
        "2.1380940889E+02 5.4723748542E-01",
        "1.2354515176E+01 1.0455993237E-01",
    ),
    "Rat42": certified(
        "9 14 21 28 42 57 63 70 79",
        "8.93 10.80 18.59 22.33 39.35 56.11 61.73 64.62 67.08",
        lambda b, x, exp: b[0] / (1 + exp(b[1] - b[2] * x)),
        "7.2462237576E+01 2.6180768402E+00 6.7359200066E-02",
        "1.7340283401E+00 8.8295217536E-02 3.4465663377E-03",
    ),
    "Rat43": certified(
        np.arange(1, 16),
        "16.08 33.83 65.80 97.20 191.55 326.20 386.87 520.53 590.03 651.92 724.93 699.56 689.96 637.56 717.41",
        lambda b, x, exp: b[0] / (1 + exp(b[1] - b[2] * x)) ** (1 / b[3]),
        "6.9964151270E+02 5.2771253025E+00 7.5962938329E-01 1.2792483859E+00",
        "1.6302297817E+01 2.0828735829E+00 1.9566123451E-01 6.8761936385E-01",
    ),
    "MGH09": certified(
        "4 2 1 .5 .25 .167 .125 .1 .0833 .0714 .0625",
        "1.957E-01 1.947E-01 1.735E-01 1.600E-01 8.44E-02 6.27E-02 4.56E-02 3.42E-02 3.23E-02 2.35E-02 2.46E-02",
        lambda b, x, exp: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
        "1.9280693458E-01 1.9128232873E-01 1.2305650693E-01 1.3606233068E-01",
        "1.1435312227E-02 1.9633220911E-01 8.0842031232E-02 9.0025542308E-02",
    ),
    "MGH10": certified(
        np.arange(50, 130, 5),
        "34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820 3307 2872",
        lambda b, x, exp: b[0] * exp(b[1] / (x + b[2])),
        "5.6096364710E-03 6.1813463463E+03 3.4522363462E+02",
        "1.5687892471E-04 2.3309021107E+01 7.8486103508E-01",
    ),
    "MGH17": certified(
        np.arange(0, 330, 10),
        "8.44E-1 9.08E-1 9.32E-1 9.36E-1 9.25E-1 9.08E-1 8.81E-1 8.50E-1 8.18E-1 7.84E-1 7.51E-1 7.18E-1 6.85E-1 6.58E-1 "
        "6.28E-1 6.03E-1 5.80E-1 5.58E-1 5.38E-1 5.22E-1 5.06E-1 4.90E-1 4.78E-1 4.67E-1 4.57E-1 4.48E-1 4.38E-1 4.31E-1 "
        "4.24E-1 4.20E-1 4.14E-1 4.11E-1 4.06E-1",
        lambda b, x, exp: b[0] + b[1] * exp(-x * b[3]) + b[2] * exp(-x * b[4]),
        "3.7541005211E-01 1.9358469127E+00 -1.4646871366E+00 1.2867534640E-02 2.2122699662E-02",
        "2.0723153551E-03 2.2031669222E-01 2.2175707739E-01 4.4861358114E-04 8.9471996575E-04",
    ),
    "Eckerle4": certified(
        "400 405 410 415 420 425 430 435 436.5 438 439.5 441 442.5 444 445.5 447 448.5 450 451.5 453 454.5 456 457.5 459 "
        "460.5 462 463.5 465 470 475 480 485 490 495 500",
        "0.0001575 0.0001699 0.0002350 0.0003102 0.0004917 0.0008710 0.0017418 0.0046400 0.0065895 0.0097302 0.0149002 "
        "0.0237310 0.0401683 0.0712559 0.1264458 0.2073413 0.2902366 0.3445623 0.3698049 0.3668534 0.3106727 0.2078154 "
        "0.1164354 0.0616764 0.0337200 0.0194023 0.0117831 0.0074357 0.0022732 0.0008800 0.0004579 0.0002345 0.0001586 "
        "0.0001143 0.0000710",
        lambda b, x, exp: b[0] / b[1] * exp(-0.5 * ((x - b[2]) / b[1]) ** 2),
        "1.5543827178E+00 4.0888321754E+00 4.5154121844E+02",
        "1.5408051163E-02 4.6803020753E-02 4.6800518816E-02",
    ),
    "Lanczos3": certified(
        np.arange(24) / 20,
        "2.5134 2.0443 1.6684 1.3664 1.1232 0.9269 0.7679 0.6389 0.5338 0.4479 0.3776 0.3197 0.2720 0.2325 0.1997 0.1723 "
        "0.1493 0.1301 0.1138 0.1000 0.0883 0.0783 0.0698 0.0624",
        lambda b, x, exp: b[0] * exp(-b[1] * x) + b[2] * exp(-b[3] * x) + b[4] * exp(-b[5] * x),
        "8.6816414977E-02 9.5498101505E-01 8.4400777463E-01 2.9515951832E+00 1.5825685901E+00 4.9863565084E+00",
        "1.7197908859E-02 9.7041624475E-02 4.1488663282E-02 1.0766312506E-01 5.8371576281E-02 3.4436403035E-02",
    ),
}


OUT_OF_REACH = {np.float32: ("Rat43", "MGH09", "MGH10", "MGH17", "Lanczos3"), np.float64: ("Lanczos3",)}
"""Sets of which not every standard error has to come out, so long as the report says so."""


def slopes(known, b):
    """The Jacobian of the means by complex steps, which round nothing."""
    steps = 1e-100 * np.abs(b)
    return np.stack([known.mean(b + 1j * h * np.eye(len(b))[k], known.x, np.exp).imag / h for k, h in enumerate(steps)], 1)


@functools.cache
def refined(name):
    """The estimates to all digits of float64, the Jacobian there, and the standard deviation of the noise."""
    known, b = SETS[name], SETS[name].estimates
    for _ in range(3):
        columns = slopes(known, b)
        sizes = np.linalg.norm(columns, axis=0)
        b = b + np.linalg.lstsq(columns / sizes, known.y - known.mean(b, known.x, np.exp), rcond=None)[0] / sizes
    rest = known.y - known.mean(b, known.x, np.exp)
    return b, slopes(known, b), np.sqrt(rest @ rest / (len(rest) - len(b)))


@functools.cache
def errors_of(count, dtype):
    """One program for all sets of so many parameters: standard errors from undamped solves, and their reports."""

    def one(rows):
        score = lambda b, row: jnp.dot(row, b, precision="highest")  # noqa: E731
        F = jf.empirical_fisher(score)(jnp.zeros(count, dtype), rows)
        columns, info = jax.vmap(lambda unit: jf.solve(F, unit, 0.0))(jnp.eye(count, dtype=dtype))
        return jnp.sqrt(jnp.diagonal(columns) / rows.shape[0]), info

    return jax.jit(lambda rows: jax.lax.map(one, rows))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", sorted({len(known.errors) for known in SETS.values()}))
def test_standard_errors_in_own_units(count, dtype):
    """Right to nine digits in float64 and to four in float32, or not converged; without the equilibration most are neither."""
    names = [name for name, known in SETS.items() if len(known.errors) == count]
    most = max(len(SETS[name].x) for name in names)
    rows = np.zeros((len(names), most, count))
    for i, name in enumerate(names):
        _, columns, noise = refined(name)
        rows[i, : len(columns)] = columns / noise
    found, info = (jax.tree.map(np.asarray, part) for part in errors_of(count, dtype)(jnp.asarray(rows, dtype)))
    for name, errors, converged in zip(names, found, info.converged, strict=True):
        off = np.abs(errors / SETS[name].errors - 1)
        assert np.all(off[converged] < (1e-9 if dtype == np.float64 else 1e-4)), (name, off)
        assert np.all(converged) or name in OUT_OF_REACH[dtype], (name, info)
