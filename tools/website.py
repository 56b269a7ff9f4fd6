"""Build the site into ``_build/html`` from the outputs stored in the notebooks.

python tools/website.py           what changed; warnings are shown
python tools/website.py --strict  every page, every reference resolved; a warning is an error
"""

import argparse
import subprocess
import sys
from pathlib import Path

import assets
from project import ROOT, SITE

STRICT = ["--all", "-n", "-W", "--keep-going"]


def main() -> int:
    """Fetch the scripts if need be, build, and say how to open the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--strict", action="store_true", help="build every page and fail on a warning")
    options = parser.parse_args()
    try:
        assets.ensure()
    except assets.AssetError as error:
        sys.exit(str(error))
    build = [
        str(Path(sys.executable).parent / "jupyter-book"),
        "build",
        ".",
        *(STRICT if options.strict else ["-q"]),
    ]
    if code := subprocess.run(build, cwd=ROOT, check=False).returncode:
        return code
    print(f"Open {SITE.relative_to(ROOT)}/index.html in a browser, or run `make serve`.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
