"""Agreement of the refusal scorer with people, on XSTest's labelled completions.

    PYTHONPATH=src python bench/refusals.py XSTEST/completions_*.csv

Each file has the columns prompt, completion and final_label (1_full_compliance, 2_full_refusal, 3_partial_refusal), as published. Prints
one line of JSON a file: accuracy of "any refusal against none" with its Wilson interval, false refusals and missed ones, and the share of
equal classes of three. With `--blind` the scorer does not see the prompt.
"""

import argparse
import csv
import json
from pathlib import Path

from gristmill.evaluate.refusals import refusal_class
from gristmill.evaluate.stats import accuracy

LABELS = {"1": "complied", "2": "full", "3": "partial"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--blind", action="store_true")
    args = parser.parse_args()
    for path in args.files:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        people = [LABELS[row["final_label"][0]] for row in rows]
        ours = [refusal_class(row["completion"], "" if args.blind else row["prompt"]) for row in rows]
        pairs = list(zip(people, ours, strict=True))
        wrong = [(a == "complied", b == "complied") for a, b in pairs]
        facts = {"accuracy": accuracy([a == b for a, b in wrong]), "false_refusals": wrong.count((True, False))}
        facts |= {"missed": wrong.count((False, True)), "three_classes": accuracy([a == b for a, b in pairs])}
        print(json.dumps({"file": path.stem, **facts}))


if __name__ == "__main__":
    main()
