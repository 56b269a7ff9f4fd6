"""Run every test of the project, part by part, and say at the end what ran and how long it took.

    python tools/test.py             every part
    python tools/test.py lint unit   these parts

A part that fails does not keep the next from running; the exit status is that of all together.
"""

import argparse
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from project import BOOK, ROOT, pinned_environment

BIN = Path(sys.executable).parent
REPORTS = ROOT / "_build" / "tests"
PYTEST = [sys.executable, "-m", "pytest", "-q", "--durations=5", "--durations-min=5"]
TWO = ["-n", "2", "--dist", "loadfile"]
NBVAL = ["--nbval-lax", "--nbval-cell-timeout=900", "--nbval-sanitize-with=tests/book/sanitize.cfg"]

# Each part is a list of commands; pytest's report themselves, any other counts as one test.
PARTS: dict[str, list[list[str]]] = {
    "lint": [
        [str(BIN / "ruff"), "check", "."],
        [str(BIN / "ruff"), "format", "--check", "."],
        [str(BIN / "mypy")],
    ],
    "unit": [
        [*PYTEST, "tests", "--ignore=tests/book", *TWO],
        [*PYTEST, "--doctest-modules", "geomlib"],
    ],
    "imports": [[str(BIN / "lint-imports")]],
    "pairs": [[*PYTEST, "tests/book/test_notebooks.py", "tests/book/test_tools.py"]],
    "nbval": [[*PYTEST, *NBVAL, *TWO, str(BOOK)]],
    "smoke": [[*PYTEST, "tests/book/test_smoke.py", "-n", "2"]],
    "colab": [[*PYTEST, "tests/book/test_colab.py", "-n", "2"]],
    "site": [[sys.executable, "tools/website.py", "--strict"]],
    "browser": [[*PYTEST, "tests/book/test_browser.py"]],
}


@dataclass
class Result:
    """What one part did."""

    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def read_report(report: Path, result: Result) -> None:
    """Add what pytest wrote about its tests to the result of the part."""
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            result.counts["failed"] += 1
            result.failed.append(name)
        elif skip is not None:
            result.counts["skipped"] += 1
            result.skipped.append((skip.get("message") or "no reason given", name))
        else:
            result.counts["passed"] += 1


def run_part(name: str, commands: list[list[str]]) -> Result:
    """Run the commands of one part and return what came out."""
    result, start = Result(), time.monotonic()
    for number, command in enumerate(commands):
        words = " ".join(Path(word).name if word.startswith("/") else word for word in command)
        print(f"\n== {name}: {words}", flush=True)
        report = REPORTS / f"{name}-{number}.xml"
        reported = "pytest" in command
        if reported:
            report.unlink(missing_ok=True)
            command = [*command, f"--junitxml={report}"]
        code = subprocess.run(command, cwd=ROOT, env=pinned_environment(), check=False).returncode
        if reported and report.exists():
            read_report(report, result)
        elif code == 0:
            result.counts["passed"] += 1
        if code and not (reported and result.counts["failed"]):
            result.counts["failed"] += 1
            result.failed.append(words)
    result.seconds = time.monotonic() - start
    return result


def summary(results: dict[str, Result]) -> str:
    """Return the table of parts, what was skipped and why, what failed, and the count in one line."""
    total: Counter[str] = sum((result.counts for result in results.values()), Counter())
    lines = ["", "part        seconds   passed   failed  skipped"]
    for name, result in results.items():
        counts = (f"{result.counts[kind]:9d}" for kind in ("passed", "failed", "skipped"))
        lines.append(f"{name:9s} {result.seconds:9.0f}{''.join(counts)}")
    lines.append(f"{'all':9s} {sum(result.seconds for result in results.values()):9.0f}")
    skips: dict[str, list[str]] = {}
    for result in results.values():
        for reason, name in result.skipped:
            skips.setdefault(reason, []).append(name)
    lines += [f"\nskipped ({reason}):\n  " + "\n  ".join(names) for reason, names in skips.items()]
    failed = [f"  {name}: {test}" for name, result in results.items() for test in result.failed]
    lines += ["\nfailed:", *failed] if failed else []
    lines += ["", f"{total['passed']} passed, {total['failed']} failed"]
    return "\n".join(lines)


def main() -> int:
    """Run the parts named on the command line, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    chosen = parser.parse_args().parts or list(PARTS)
    if unknown := [part for part in chosen if part not in PARTS]:
        parser.error(f"parts must be among {', '.join(PARTS)}, got {', '.join(unknown)}")
    REPORTS.mkdir(parents=True, exist_ok=True)
    results = {name: run_part(name, PARTS[name]) for name in chosen}
    print(summary(results), flush=True)
    return 1 if any(result.counts["failed"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
