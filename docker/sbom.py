"""sbom.py: the packages of this environment and of the distribution as a CycloneDX 1.6 list on stdout."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
from collections.abc import Iterator


def python_packages() -> Iterator[tuple[str, str, str]]:
    """(name, version, package URL)."""
    for found in importlib.metadata.distributions():
        name = found.metadata["Name"].lower().replace("_", "-")
        yield name, found.version, f"pkg:pypi/{name}@{found.version.replace('+', '%2B')}"


def system_packages() -> Iterator[tuple[str, str, str]]:
    """As python_packages(), from dpkg; nothing where there is none."""
    if shutil.which("dpkg-query"):
        listed = subprocess.run(["dpkg-query", "-W", "-f", "${Package}\t${Version}\n"], capture_output=True, text=True, check=True).stdout
        for line in listed.splitlines():
            name, version = line.split("\t")
            yield name, version, f"pkg:deb/{name}@{version.replace('+', '%2B').replace(':', '%3A')}"


if __name__ == "__main__":
    rows = sorted({*python_packages(), *system_packages()})
    components = [{"type": "library", "name": name, "version": version, "purl": url} for name, version, url in rows]
    print(json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": components}, indent=1))
