"""Runs pytest inside the environment of a tool, which has neither pytest nor this package.

usage: PYTHON_OF_THE_TOOL within.py SITE_PACKAGES_OF_OURS [arguments of pytest]

Our site-packages come after the tool's own, so that the tool runs with the versions that it is installed with. The two
Pythons must be of one version.
"""

import os
import site
import sys

# A process that a test spawns imports this file as well.
site.addsitedir(sys.argv[1])
os.environ["MERGEKERNELS_SITE"] = sys.argv[1]

if __name__ == "__main__":
    import pytest

    # Warnings of the tools are their affair.
    options = ["-o", "filterwarnings=default", "-p", "no:cacheprovider", "-p", "no:xdist"]
    sys.exit(pytest.main([*options, *sys.argv[2:]]))
