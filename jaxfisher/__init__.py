"""Information geometry as function transformations in JAX: KL divergences, Fisher matrices, natural gradients.

Data flows one way: a model of one example, its scores, a Fisher operator, a solve, an update.
"""

__version__ = "0.1.0"
