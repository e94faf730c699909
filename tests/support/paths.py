"""Where the repository and the tests' data lie."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
BENCHMARKS = ROOT / "benchmarks"
