"""Make the virtual environment that every other command runs in; standard library only.

    python3 tools/bootstrap.py            .venv, with the versions that the book was built with
    python3 tools/bootstrap.py --unpinned .venv, with the newest versions of this day
    python3 tools/bootstrap.py --peers    the same and the packages that the benchmarks measure

Nothing happens when the environment is already what ``pyproject.toml`` and ``constraints.txt`` ask
for. An environment that was not made here (conda's, for instance) is only looked at, never changed.
The file keeps to the syntax of old Pythons, so that one of them can say what is missing.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
EXTRAS = "test"
WITH_PEERS = "test,bench"
LOG = ROOT / "_build" / "install.log"
NO_NETWORK = (
    "NewConnectionError",
    "ConnectTimeout",
    "ReadTimeout",
    "ProxyError",
    "name resolution",
    "unreachable",
)


def missing_from_python(version, has_module):
    """Return one sentence on what this Python lacks, or None; ``has_module`` answers for a module name."""
    if tuple(version[:2]) < OLDEST:
        return (
            "Python {}.{} is too old: install Python {}.{} or newer and run `make book PYTHON=python{}.{}`."
        ).format(*version[:2], *OLDEST, *OLDEST)
    if not (has_module("venv") and has_module("ensurepip")):
        return (
            "This Python cannot make virtual environments: install its venv module "
            "(on Debian and Ubuntu: `apt-get install python{}.{}-venv`) and run the command again.".format(
                *version[:2]
            )
        )
    return None


def reason_of_failure(log):
    """Return one sentence on why pip failed, read from what it wrote."""
    if any(word in log for word in NO_NETWORK):
        return (
            "No package index could be reached: connect to a network, or point pip at a mirror "
            "(`pip config set global.index-url ADDRESS`), and run the command again."
        )
    if "requires a different Python" in log:
        return "The environment was made by a Python that is too old: remove .venv and run the command again."
    if "No matching distribution found" in log or "ResolutionImpossible" in log:
        return (
            "A pinned version does not exist for this system: `make book UNPINNED=1` installs the newest "
            "versions instead."
        )
    if "No space left" in log:
        return "The disk is full: PyTorch and the book's tools need about 6 GB."
    return "pip could not install the packages; its last lines above say why."


def wanted_state(venv, unpinned, extras):
    """Return a digest of everything that decides what the environment holds."""
    digest = hashlib.sha256("{} {} {}".format(ROOT, extras, unpinned).encode())
    for path in (ROOT / "pyproject.toml", ROOT / "constraints.txt", venv / "pyvenv.cfg"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_foreign(python):
    """Stop with a sentence unless the environment of ``python`` has what the commands need."""
    code = "import geomlib, jupyter_book, papermill, pytest"
    if subprocess.call([str(python), "-c", code], cwd=str(ROOT)):
        sys.exit(
            "This environment lacks packages: run `conda env update -f environment.yml` and then this again."
        )


def install(python, unpinned, extras):
    """Let pip install the library in place with every tool; what it writes goes into a log."""
    LOG.parent.mkdir(exist_ok=True)
    pins = [] if unpinned else ["--constraint", str(ROOT / "constraints.txt")]
    call = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *pins]
    print(
        "Installing PyTorch and the book's tools; the first time takes minutes. Log: _build/install.log",
        flush=True,
    )
    with LOG.open("w") as log:
        code = subprocess.call([*call, "--editable", "{}[{}]".format(ROOT, extras)], stdout=log, stderr=log)
    if code:
        text = LOG.read_text(errors="replace")
        sys.exit("{}\n{}".format("\n".join(text.splitlines()[-8:]), reason_of_failure(text)))


def main():
    """Make the environment named on the command line what the project asks for."""
    parser = argparse.ArgumentParser(description="Make the virtual environment.")
    parser.add_argument("venv", nargs="?", default=".venv", type=Path)
    parser.add_argument("--unpinned", action="store_true", help="ignore constraints.txt")
    parser.add_argument("--peers", action="store_true", help="what the benchmarks measure beside us, too")
    options = parser.parse_args()
    venv = ROOT / options.venv
    python = venv / "bin" / "python"
    if python.exists() and not (venv / "pyvenv.cfg").exists():
        return check_foreign(python)
    stamp = venv / "geomlib-stamp"
    # An environment that has the peers has all that the other commands need, too.
    enough = [WITH_PEERS] if options.peers else [EXTRAS, WITH_PEERS]
    made_for = stamp.read_text() if python.exists() and stamp.exists() else None
    if made_for and made_for in [wanted_state(venv, options.unpinned, extras) for extras in enough]:
        return None
    if not python.exists():
        problem = missing_from_python(
            sys.version_info, lambda name: importlib.util.find_spec(name) is not None
        )
        if problem:
            sys.exit(problem)
        shutil.rmtree(str(venv), ignore_errors=True)
        print("Making a virtual environment in {}".format(os.path.relpath(str(venv))), flush=True)
        if subprocess.call([sys.executable, "-m", "venv", str(venv)]):
            sys.exit("The virtual environment could not be made; the lines above say why.")
    install(python, options.unpinned, enough[0])
    stamp.write_text(wanted_state(venv, options.unpinned, enough[0]))
    return None


if __name__ == "__main__":
    main()
