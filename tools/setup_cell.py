# @title Set-up: find geomlib beside this notebook, or install it; torch stays as it is
import importlib.util
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

REPOSITORY = "https://github.com/geometry-of-depth/course"

here = Path.cwd().resolve()
library = Path("geomlib", "__init__.py")
clones = [folder for folder in (here, *here.parents) if (folder / library).is_file()]
if clones:
    sys.path.insert(0, str(clones[0]))
elif importlib.util.find_spec("geomlib") is None:
    kept = {"torch", "torchvision", "numpy"}
    pins = [f"{d.name}=={d.version}\n" for d in distributions() if d.name in kept]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as constraints:
        constraints.writelines(pins)
    wanted = f"geomlib[lab] @ git+{REPOSITORY}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    pip += ["--constraint", constraints.name, wanted]
    if subprocess.run(pip, check=False).returncode:
        raise RuntimeError(f"pip could not install {wanted}: is this machine online?")
    importlib.invalidate_caches()

from geomlib.lab import environment

environment.report()
