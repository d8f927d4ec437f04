"""Looks up what constraints.txt pins in the database of known vulnerabilities (OSV), by pip-audit.

Exit codes: 0 nothing known, or the database cannot be reached, which is said; 1 something known, or pip-audit failed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What pip-audit dies of, in a traceback, where it does not get through.
UNREACHABLE = ("requests.exceptions.", "ServiceError", "ConnectionError")


def verdict(report: dict[str, Any] | None, errors: str) -> tuple[int, list[str]]:
    """The exit code, and what to say.

    Args:
        report: what pip-audit wrote as JSON; None where it wrote nothing.
        errors: what it said beside that.
    """
    if report is None:
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        if any(name in errors for name in UNREACHABLE):
            return 0, [f"audit: NOT DONE: the database of vulnerabilities cannot be reached ({last})"]
        return 1, [f"audit: pip-audit failed: {last}"]
    packages = report["dependencies"]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    known = [
        f"{package['name']} {package['version']}: {found['id']} ({', '.join(found['aliases']) or 'no other name'}), "
        f"mended in {', '.join(found['fix_versions']) or 'no version yet'}"
        for package in packages
        for found in package.get("vulns", [])
    ]
    if len(unknown) == len(packages):
        return 0, [f"audit: NOT DONE: the database of vulnerabilities knows none of {len(packages)} packages"]
    left_out = f"; {len(unknown)} could not be looked up: {', '.join(unknown)}" if unknown else ""
    return int(bool(known)), [
        *known,
        f"audit: {len(known)} known vulnerabilities in {len(packages) - len(unknown)} packages{left_out}",
    ]


def main() -> int:
    """Audit, say what was found, and return the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "audit.json"
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(ROOT / "constraints.txt")]
        # Each version is pinned there: nothing is resolved, and no index of packages is asked.
        command += ["--no-deps", "--disable-pip", "--vulnerability-service", "osv", "--timeout", "15"]
        command += ["--progress-spinner", "off", "--format", "json", "--output", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        written = out.read_text(encoding="utf-8") if out.exists() else ""
    code, lines = verdict(json.loads(written) if written else None, done.stderr)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
