"""Runs when Python starts in what ``tests.torture.launched`` starts: the hooks of a rank, or of a run without ranks."""

import json
import os

wish = json.loads(os.environ.get("TORTURE_HOOKS", "{}"))
if os.environ.get("RANK", "") in wish:
    from tests.torture import hooks

    hooks.install(**wish[os.environ.get("RANK", "")])
