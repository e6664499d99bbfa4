"""Runs when Python starts in a rank that ``tests.torture.launched`` has Accelerate's launcher start: its hooks."""

import json
import os

if "RANK" in os.environ:
    wish = json.loads(os.environ["TORTURE_HOOKS"])
    if os.environ["RANK"] in wish:
        from tests.torture import hooks

        hooks.install(**wish[os.environ["RANK"]])
