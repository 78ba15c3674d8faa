"""bench/faults.py: in its short form, no fault that is tried on the programs loses anything."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_no_fault_of_the_short_form_loses_anything():
    command = [sys.executable, "bench/faults.py", "--short"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "train" in result.stdout and "eval" in result.stdout
