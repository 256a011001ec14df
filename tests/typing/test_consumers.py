"""Users' code is typed: mypy --strict and pyright read it, and see the mistakes in misuse.py."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CODE = [str(path) for path in sorted(HERE.glob("*.py")) if path.name != Path(__file__).name]


def test_mypy_strict_finds_the_types_and_the_mistakes():
    # the package's own settings: strict, with warnings of comments that ignore nothing
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *CODE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"no issues found in {len(CODE)} source files" in done.stdout


@pytest.mark.skipif(
    importlib.util.find_spec("pyright") is None, reason="pyright is not installed: pip install it"
)
def test_pyright_finds_the_types_and_the_mistakes(tmp_path):
    for path in CODE:  # pyright takes only what lies below its settings
        shutil.copy(path, tmp_path)
    settings = {
        "extraPaths": [str(ROOT)],
        "pythonVersion": "3.11",
        "enableTypeIgnoreComments": True,
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), "utf-8")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    found = [
        f"{Path(entry['file']).name}:{entry['range']['start']['line'] + 1}: {entry['message']}"
        for entry in report["generalDiagnostics"]
        if entry["severity"] == "error"
    ]
    assert found == []
    assert report["summary"]["filesAnalyzed"] == len(CODE)
