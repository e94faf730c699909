"""The emulated network of benchmarks/network, for tests marked netns."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks" / "network"))

from _cases import CASES as CASES
from _cases import racks as racks
from _cases import renamed as renamed
from _lab import Lab as Lab
from _routes import Routes as Routes
