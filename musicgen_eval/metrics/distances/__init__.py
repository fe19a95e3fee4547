"""Distances between two sets of embeddings, as pure functions of arrays, and the confidence interval of the Fréchet distance."""
