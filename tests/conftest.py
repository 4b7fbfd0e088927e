"""Modules that hold checks for several test files say what differs, as the test files do."""

import pytest

pytest.register_assert_rewrite(
    "feature_cases",
    "feature_programs",
    "feature_shared",
    "feature_streams",
    "feature_sums",
    "feature_sweeps",
    "gpu_cases",
    "gpu_feature_cases",
    "gpu_matrix",
)
