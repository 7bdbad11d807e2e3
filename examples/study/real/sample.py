"""The rollouts that ship with the package: 24 of the study's prompts, the first 40 answers to each.

    python examples/study/real/sample.py --work runs/real --out leafkernels/command/sample_rollouts.jsonl.gz

Of each family the eight prompts whose answers earn the most different rewards; the prompt of docs/tree.png comes first.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from pathlib import Path
from statistics import pvariance

import rollouts
from rollouts import Record
from tasks import FAMILIES

PROMPTS, ROLLOUTS = 8, 40  # of each family, of each prompt
FIRST = "reversal-11"
SOURCE = "SmolLM2-135M-Instruct (Apache-2.0) after 40 supervised steps, tasks of reasoning-gym (Apache-2.0)"


def chosen(work: Path) -> list[Record]:
    found = []
    for family in FAMILIES:
        records = rollouts.taken(work, "measured", [family])
        spread = {id(of): pvariance([row["reward"] for row in of["completions"][:ROLLOUTS]]) for of in records}
        found += sorted(records, key=lambda of: -spread[id(of)])[:PROMPTS]
    return sorted(found, key=lambda of: of["prompt_id"] != FIRST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    lines = []
    for record in chosen(arguments.work):
        kept = {name: record[name] for name in ("prompt_id", "prompt")} | {"source": SOURCE}
        lines.append(json.dumps(kept | {"completions": record["completions"][:ROLLOUTS]}, separators=(",", ":")) + "\n")
    # Without a time stamp the same groups always give the same bytes.
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    partial.write_bytes(gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0))
    os.replace(partial, arguments.out)


if __name__ == "__main__":
    main()
