"""sbom.py: Python, its packages and those of the distribution as a CycloneDX 1.6 list on stdout."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Iterator
from urllib.parse import quote


def python_packages() -> Iterator[tuple[str, str, str]]:
    """(name, version, package URL), Python itself first."""
    yield "cpython", platform.python_version(), f"pkg:generic/cpython@{platform.python_version()}"
    for found in importlib.metadata.distributions():
        name = found.metadata["Name"].lower().replace("_", "-")
        yield name, found.version, f"pkg:pypi/{name}@{quote(found.version, safe='')}"


def system_packages() -> Iterator[tuple[str, str, str]]:
    """As python_packages(), from dpkg; nothing where there is none."""
    if shutil.which("dpkg-query"):
        vendor, release = (platform.freedesktop_os_release()[key] for key in ("ID", "VERSION_ID"))  # scanners match by both
        listed = subprocess.run(["dpkg-query", "-W", "-f", "${Package}\t${Version}\n"], capture_output=True, text=True, check=True).stdout
        for line in listed.splitlines():
            name, version = line.split("\t")
            yield name, version, f"pkg:deb/{vendor}/{name}@{quote(version, safe='')}?distro={vendor}-{release}"


if __name__ == "__main__":
    rows = sorted({*python_packages(), *system_packages()})
    components = [{"type": "library", "name": name, "version": version, "purl": url} for name, version, url in rows]
    print(json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": components}, indent=1))
