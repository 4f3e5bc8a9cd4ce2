"""Plots of a Fisher with matplotlib: KL balls, spectra, heat maps of blocks, confidence ellipses, and the progress of training.

Import the module by name, ``from jaxfisher import plot``: ``import jaxfisher`` alone does not import matplotlib, which is an
optional dependency (``pip install 'jaxfisher[plot]'``). `triangle` draws on an array of axes and returns it; every other
function draws on one axes and returns that. No function changes matplotlib's style or settings, and none shows or saves a
figure. Curves differ in colour (the palette of Okabe and Ito), in dash and in marker. The legend counts the numbers that cannot
be drawn, such as a zero on a log axis.

Args:
    ax: in every function except `triangle`, the matplotlib `Axes` to draw on; None makes a figure with one axes.

Reference: Okabe and Ito, Color Universal Design (2008), for the colours.

>>> import jax.numpy as jnp, matplotlib, jaxfisher as jf
>>> matplotlib.use("Agg")
>>> from jaxfisher import plot
>>> F = jf.exact_fisher(lambda w, x: jf.Bernoulli(logits=x @ w))(jnp.zeros(2), jnp.array([[1.0, 0.0], [1.0, 2.0]]))
>>> plot.spectrum(F, damping=1e-2).get_ylabel()
'eigenvalue of F (nats per squared parameter)'
"""

from jaxfisher.plot._blocks import blocks as blocks
from jaxfisher.plot._kl_along import kl_along as kl_along
from jaxfisher.plot._metric_ellipses import metric_ellipses as metric_ellipses
from jaxfisher.plot._paths import paths as paths
from jaxfisher.plot._spectrum import spectrum as spectrum
from jaxfisher.plot._training import training as training
from jaxfisher.plot._triangle import triangle as triangle
