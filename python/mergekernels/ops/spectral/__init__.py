"""Batched factorisations and projections of matrices, on torch tensors: no dense SVD where algebra avoids it."""
