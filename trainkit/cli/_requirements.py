"""Our own distribution, and what its metadata asks of others: the versions that hints name."""

import importlib.metadata
import re

DISTRIBUTION = "trainkit-systems"
"""What pip installs us by; `trainkit` on the registry is somebody else's."""

# what a package is installed by, where that is not the name that it is imported by
_INSTALLED_BY = {"skopt": "scikit-optimize", "p4runtime_sh": "p4runtime-shell", "p4": "p4runtime-shell"}


def pip_install(package: str) -> str:
    """The command that brings `package` (imported or installed by that name) in a version that we work with."""
    name = _INSTALLED_BY.get(package, package.replace("_", "-"))
    try:
        wanted = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        wanted = []
    plain = [text.split(";")[0].strip() for text in wanted]
    ours = [text for text in plain if re.match(r"[\w.-]*", text)[0] == name]  # type: ignore[index]
    return f"pip install '{ours[0] if ours else name}'"
