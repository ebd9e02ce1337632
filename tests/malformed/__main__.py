"""Run the malformed inputs and list those that did not end as they should."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.malformed import all_cases, world
from tests.malformed.case import run


def main(words: list[str]) -> int:
    verdicts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        base = world.write(Path(folder) / "world")
        for number, case in enumerate(all_cases(base)):
            if words and not any(word in case.name for word in words):
                continue
            outcome = run(case, Path(folder) / f"{number:04d}")
            verdicts[outcome.verdict] += 1
            if outcome.verdict != "fine":
                print(
                    f"{outcome.verdict}: {case.name}\n    " + "\n    ".join(outcome.said.strip().splitlines()[-6:]),
                    flush=True,
                )
    print(f"{sum(verdicts.values())} malformed inputs: " + ", ".join(f"{n} {v}" for v, n in verdicts.most_common()))
    return int(set(verdicts) != {"fine"})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
