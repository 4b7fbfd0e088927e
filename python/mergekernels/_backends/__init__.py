"""Backends: modules with the same functions (`sweep`, `stream`, `why_not`), and the table that picks one.

reference: plain torch, the specification. cpu: C++. triton: GPU (or its interpreter). cuda: C++ for NVIDIA GPUs.
"""
