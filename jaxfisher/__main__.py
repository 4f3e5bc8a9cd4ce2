"""The demo on real data: ``python -m jaxfisher``.

On scikit-learn's handwritten digits it makes one Fisher in three ways, trains a small network with Adam, SGD and natural
gradients, and draws the losses. Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from jaxfisher import _demo as demo


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jaxfisher", description=__doc__.split("\n\n")[1].replace("\n", " "))
    parser.add_argument("--figure", type=Path, default=Path("jaxfisher_demo.png"), help="where the figure goes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the seed of initial parameters, batches and draws (%(default)s)")
    return parser.parse_args(argv)


def show_routes(digits: demo.Digits, seed: int) -> None:
    """Print the three routes to one Fisher, in float64."""
    # The routes differ by rounding, which is much smaller in float64. The switch ends with the block.
    with jax.enable_x64(True):
        x = jnp.asarray(digits.train_x, jnp.float64)
        params = demo.softmax_params(jax.random.key(seed), x.shape[1], x.dtype)
        routes = demo.three_routes(params, x)
    print(f"One Fisher, three routes: softmax regression on {len(x)} digits, p = {len(routes.kl_hessian)}, float64.\n")
    print(demo.routes_table(routes))


def trained(recipe: demo.Recipe, digits: demo.Digits, seed: int) -> demo.Run:
    """Train with a progress bar on stderr."""
    from tqdm import tqdm

    with tqdm(total=demo.MAX_STEPS, desc=recipe.name, unit="step", file=sys.stderr) as bar:

        def show(steps: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(steps)

        return demo.train(recipe, digits, seed, show)


def show_training(digits: demo.Digits, seed: int) -> list[demo.Run]:
    """Train with every optimiser and print the table."""
    from threadpoolctl import threadpool_limits

    # On a CPU JAX factorises with SciPy's BLAS, whose threads compete with XLA's: with one thread a step takes half the time.
    with threadpool_limits(limits=1, user_api="blas"):
        runs = compared(digits, seed)
    print(demo.training_intro())
    print(demo.training_table(runs) + "\n")
    print(demo.remarks(runs[0], runs[2:]))
    return runs


def compared(digits: demo.Digits, seed: int) -> list[demo.Run]:
    """The best Adam, the best SGD, and the natural gradients."""
    adams = [trained(recipe, digits, seed) for recipe in demo.first_order("Adam", optax.adam, demo.ADAM_RATES)]
    sgds = [trained(recipe, digits, seed) for recipe in demo.first_order("SGD", optax.sgd, demo.SGD_RATES)]
    natural = [trained(recipe, digits, seed) for recipe in demo.natural_recipes()]
    return [demo.best(adams), demo.best(sgds), *natural]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    options = arguments(argv)
    missing = demo.missing_extras()
    if missing:
        sys.exit(f"The demo needs {', '.join(missing)}: pip install 'jaxfisher[demo]'")
    digits = demo.load_digits()
    show_routes(digits, options.seed)
    runs = show_training(digits, options.seed)
    demo.draw_losses(runs, options.figure)
    print(f"\nFigure: {options.figure.resolve()}")


if __name__ == "__main__":
    main()
