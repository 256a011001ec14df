"""Starts a script as several processes that meet over gloo, and gathers what each of them says."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]


def said_by_all(script, ranks, /, **settings):
    """The last line, in JSON, that each rank prints.

    ``script`` gets one argument, a JSON object: ``settings``, its ``rank``, and ``meeting``, the
    address of the process group's store.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A file to meet at: a free port may be taken before it is used, and its server goes with
        # the first process that ends.
        settings = settings | {"meeting": (Path(folder) / "store").as_uri()}
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        workers = [
            subprocess.Popen(
                [sys.executable, str(script), json.dumps(settings | {"rank": rank})],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": path},
            )
            for rank in range(ranks)
        ]
        said = []
        try:
            for worker in workers:
                out, err = worker.communicate(timeout=240)
                assert worker.returncode == 0, err
                said.append(json.loads(out.splitlines()[-1]))
        finally:  # nobody is left waiting for one that failed
            for worker in workers:
                worker.kill()
                worker.communicate()
    return said
