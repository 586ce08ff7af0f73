"""What mypy and pyright make of the public face: the files beside this one hold what users write, and how it is typed.

A ``type: ignore`` in them is a claim that the line is wrong: both checkers complain of one that is not needed.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import missing

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FILES = [str(path) for path in sorted(HERE.glob("*.py")) if not path.name.startswith(("test_", "_"))]

CHECKERS = {
    "mypy": ["mypy", "--strict", "--warn-unused-ignores", *FILES],
    "pyright": ["pyright", "--pythonpath", sys.executable, *FILES],
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=58)


@pytest.mark.parametrize("checker", CHECKERS)
def test_what_users_write_is_typed_and_what_does_not_fit_is_rejected(checker):
    if importlib.util.find_spec(checker) is None:
        missing(f"{checker} is not installed")
    if run(checker, "--version").returncode:
        missing(f"{checker} is installed, but does not run")
    done = run(*CHECKERS[checker])
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_something_to_check():
    assert len(FILES) == 2
    assert all("# type: ignore[" in Path(file).read_text("utf-8") for file in FILES)
