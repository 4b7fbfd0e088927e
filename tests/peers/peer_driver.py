"""Runs mergekit-yaml on many recipes in one process; its start takes seconds. For the Python of the peer environment.

usage: python peer_driver.py RECIPE OUT [RECIPE OUT ...]
"""

import sys

from mergekit.scripts.run_yaml import main

OPTIONS = ["--allow-crimes", "--no-copy-tokenizer", "--no-write-model-card", "--quiet"]

for recipe, out in zip(sys.argv[1::2], sys.argv[2::2]):  # noqa: B905
    main.main(args=[recipe, out, *OPTIONS], standalone_mode=False)
