"""Hold the first run (recipes/nano_sft.toml) against what it must show. Usage: check_first_run.py RUN"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LEAST_RISE = 25
"""Points of the trait score that the seeded model lies above the untouched one, at least."""

SEEDED = (40, 85)
"""Where the seeded model's score lies, so that later cycles can move both ways."""


def problems(report: dict[str, Any]) -> list[str]:
    """What the run does not show, a sentence each."""
    cycles = {cycle["cycle"]: cycle for cycle in report["cycles"]}
    found = [] if report["complete"] else ["the run is not complete"]
    if sorted(cycles) != [-1, 0, 1, 2, 3, 4]:
        return [*found, f"cycles {sorted(cycles)} instead of -1 to 4"]
    untouched, seeded = (cycles[number]["trait"]["mean"] for number in (-1, 0))
    if seeded - untouched < LEAST_RISE:
        found.append(f"the seeded model scores {seeded:.1f}, the untouched one {untouched:.1f}: less than {LEAST_RISE} apart")
    if not SEEDED[0] <= seeded <= SEEDED[1]:
        found.append(f"the seeded model's score {seeded:.1f} is not between {SEEDED[0]} and {SEEDED[1]}")
    for number, cycle in cycles.items():
        trait = cycle["trait"]
        if cycle["answers"] != 60:
            found.append(f"cycle {number}: {cycle['answers']} answers instead of 12 x 5")
        if trait["scored"] + trait["unscored"] != cycle["answers"]:
            found.append(f"cycle {number}: {trait['scored']} scored and {trait['unscored']} unscored of {cycle['answers']}")
        if sum(trait["reasons"].values()) != trait["unscored"]:
            found.append(f"cycle {number}: an unscored answer has no reason")
        parity = cycle["export"]["parity"]
        if not parity["same_tokens"] or parity["mean_kl"] > 0.01:
            found.append(f"cycle {number}: the export differs from the trained model: {parity}")
    return found


def main() -> int:
    """Print what the run shows; 1 if it does not show what it must."""
    command = Path(sys.executable).parent / "iterft"
    printed = subprocess.run([command, "report", sys.argv[1], "--json"], capture_output=True, text=True, check=True)
    report = json.loads(printed.stdout)
    for cycle in report["cycles"]:
        print(cycle["cycle"], cycle["trait"], cycle["coherence"]["mean"], sum(cycle["seconds"].values()))
    found = problems(report)
    print("\n".join(found) or "the first run shows what it must")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
