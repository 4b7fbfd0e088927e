"""Configurations for FusionBench: `hydra.searchpath=[pkg://mergekernels.integrations.fusionbench.config]`."""
