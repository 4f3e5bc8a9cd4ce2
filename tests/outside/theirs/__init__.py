"""A package of a user's own: one of each thing that `jaxfisher` can be extended by, made with its public names alone."""
