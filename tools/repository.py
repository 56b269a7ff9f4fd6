"""Write another repository address wherever the present one stands.

    python tools/repository.py https://github.com/someone/course

The address stands in ``_config.yml``. Every other file that names it (set-up cells, README, package
metadata, links into Colab) is rewritten from there.
"""

import re
import sys
from pathlib import Path

from project import ROOT, repository_url

PATTERNS = ("*.md", "*.toml", "*.yml", "*.cff", "book/**/*.md", "book/**/*.ipynb", "tools/setup_cell.py")
GITHUB = "https://github.com/"


def files() -> list[Path]:
    """Return the files that may name the address."""
    return sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern) if path.is_file()})


def rewritten(text: str, old: str, new: str) -> str:
    """Return ``text`` with the new address, in Colab's links too, which name owner and project alone."""
    text = text.replace(old, new)
    if old.startswith(GITHUB) and new.startswith(GITHUB):
        text = text.replace(f"/github/{old.removeprefix(GITHUB)}/", f"/github/{new.removeprefix(GITHUB)}/")
    return text


def main() -> int:
    """Rewrite the address to the one on the command line."""
    new = sys.argv[1].rstrip("/").removesuffix(".git") if len(sys.argv) == 2 else ""
    if not re.fullmatch(r"https://[\w.-]+(/[\w.-]+)+", new):
        sys.exit("Say the new address: make repository URL=https://github.com/OWNER/PROJECT")
    old = repository_url()
    for path in files():
        before = path.read_text(encoding="utf8")
        after = rewritten(before, old, new)
        if after != before:
            path.write_text(after, encoding="utf8")
            print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
