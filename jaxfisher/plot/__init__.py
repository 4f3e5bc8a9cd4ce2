"""Looking at a Fisher: KL balls, spectra, heat maps of blocks, and the paths and curves of training, drawn with matplotlib.

Import it by name, ``from jaxfisher import plot``; ``import jaxfisher`` alone does not import matplotlib, an optional extra:
``pip install 'jaxfisher[plot]'``. Every function draws on one axes and returns it, and `triangle` on an array of them. Nothing
global changes: no style, no settings, and no figure is shown or saved. Curves differ in colour (Okabe and Ito's), in dash and
in marker. Numbers that have no place on an axis, such as a zero on a log axis, are counted in the legend.

Args:
    ax: of every other function, a matplotlib `Axes` to draw on; None makes a figure with one axes.

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
