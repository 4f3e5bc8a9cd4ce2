"""The Optax side: gradient transformations that take the curvature as a value, one a file."""
