"""The distributions a model may predict, one family a file.

A family whose support moves with its parameter (the uniform on [0, theta]) does not belong here: its score has mean -1/theta,
minus its expected Hessian has the wrong sign, and its KL has no quadratic form, so the identities behind every Fisher of this
library fail.
"""
