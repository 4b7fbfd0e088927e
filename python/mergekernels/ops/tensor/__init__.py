"""Tensor factorisations of stacks of low-rank updates, and clusters of their rank-1 units, on torch.

A stack is one module's T updates B_t A_t, never formed. Everything is computed on cores: small float64 matrices that
hold the stack in orthonormal bases of its columns and rows.
"""
