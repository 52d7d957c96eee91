"""`make sbom`: a bill of materials in CycloneDX 1.6, from the lock or from what an image has in it.

python -m containers.sbom gpu build/moetrain-gpu.cdx.json
python -m containers.sbom cpu build/moetrain-cpu.cdx.json --image moetrain:cpu --engine buildah
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import uuid
from collections.abc import Iterable
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from containers import lock as pins
from containers.build import find_engine, root_of

Component = dict[str, Any]


def of_lock(lock: dict[str, Any], target: str) -> list[Component]:
    """What the lock puts into a target's image: Python packages with their hashes, sources, the base image."""
    components = []
    for pin in pins.packages(lock, target).values():
        if not (pin.test if target == "gpu" else pins.NVIDIA.match(pin.name)):
            hashes = [{"alg": "SHA-256", "content": text} for text in pin.hashes]
            # One file is installed, and which of several says the Python; a component has the hash of one file.
            components.append(
                python_component(pin.name, pin.version) | ({"hashes": hashes} if len(hashes) == 1 else {})
            )
    if target == "gpu":
        for pin in lock["sources"].values():
            components.append(source_component(pin))
    base = lock["images"]["cuda" if target == "gpu" else "debian"]
    components.append(container_component(base))
    return components


def python_component(name: str, version: str) -> Component:
    """A Python package."""
    url = f"pkg:pypi/{name}@{version.replace('+', '%2B')}"
    return {"type": "library", "name": name, "version": version, "purl": url, "bom-ref": url}


def source_component(pin: dict[str, Any]) -> Component:
    """What is built from a commit."""
    url = f"pkg:github/{pin['url'].removeprefix('https://github.com/').lower()}@{pin['commit']}"
    return {"type": "library", "name": pin["name"], "version": pin["version"], "purl": url, "bom-ref": url}


def container_component(pin: dict[str, Any]) -> Component:
    """A base image; by its tag where the lock has no digest."""
    version = pin["tag"] if pin["digest"] == "unknown" else pin["digest"]
    url = f"pkg:docker/{pin['name']}@{version.replace(':', '%3A')}"
    return {"type": "container", "name": pin["name"], "version": version, "purl": url, "bom-ref": url}


def of_root(root: Path) -> list[Component]:
    """What is installed below a root directory, read from its files: Debian's packages, then Python's."""
    components = []
    system = _fields(root / "etc/os-release")
    status = root / "var/lib/dpkg/status"
    for block in status.read_text(encoding="utf-8").split("\n\n") if status.is_file() else ():
        package = HeaderParser().parsestr(block)
        if package.get("Status", "").endswith(" installed"):
            name, version = package["Package"], package["Version"]
            quoted = version.replace("+", "%2B").replace(":", "%3A")
            url = f"pkg:deb/{system.get('ID', 'debian')}/{name}@{quoted}?arch={package['Architecture']}"
            components.append({"type": "library", "name": name, "version": version, "purl": url, "bom-ref": url})
    for metadata in sorted((root / "opt/venv/lib").glob("python*/site-packages/*.dist-info/METADATA")):
        package = HeaderParser().parsestr(metadata.read_text(encoding="utf-8", errors="replace"))
        components.append(python_component(re.sub(r"[-_.]+", "-", package["Name"]).lower(), package["Version"]))
    return components


def _fields(path: Path) -> dict[str, str]:
    """A file of lines KEY=value."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return {key: value.strip('"') for key, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE)}


def merged(found: list[Component], locked: list[Component]) -> list[Component]:
    """What was found in an image, with the lock's hashes; sources and base images, which leave no trace, from the lock.

    The package of a source's name in the Python registry is another one, so a source is not listed as such.
    """
    known = {component["bom-ref"]: component for component in locked}
    apart = {ref: component for ref, component in known.items() if not ref.startswith("pkg:pypi/")}
    names = {component["name"].replace("_", "-") for component in apart.values()}
    installed = [
        component for component in found if component["name"] not in names or "pkg:pypi" not in component["purl"]
    ]
    return [*(known.get(component["bom-ref"], component) for component in installed), *apart.values()]


def document(target: str, lock_digest: str, components: Iterable[Component]) -> dict[str, Any]:
    """The bill, the same for the same contents: no time of day, and a serial number that follows from them."""
    found = {component["bom-ref"]: component for component in components}
    listed = [found[ref] for ref in sorted(found)]
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([target, lock_digest, listed], sort_keys=True))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {
            "component": {"type": "container", "name": "moetrain", "version": target, "bom-ref": f"moetrain:{target}"},
            "properties": [{"name": "moetrain:lock:sha256", "value": lock_digest}],
        },
        "components": listed,
    }


def main() -> None:
    """Write the bill of the image, or where none is named that of the lock."""
    parser = argparse.ArgumentParser(prog="python -m containers.sbom", allow_abbrev=False)
    parser.add_argument("target", choices=pins.TARGETS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--image", help="an image that has been built")
    parser.add_argument("--engine")
    wanted = parser.parse_args()
    components = of_lock(pins.read(), wanted.target)
    if wanted.image:
        try:
            engine = find_engine(wanted.engine or None)
        except ValueError as error:
            sys.exit(str(error))
        with root_of(engine, wanted.image) as root:
            components = merged(of_root(root), components)
    wanted.file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document(wanted.target, pins.digest(), components), indent=2) + "\n"
    wanted.file.write_text(text, encoding="utf-8")
    print(f"{wanted.file}: {text.count('bom-ref') - 1} components")


if __name__ == "__main__":
    main()
