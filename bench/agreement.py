"""Agreement statistics of the studio on public sets of people's answers, beside what other programs compute.

    PYTHONPATH=src python bench/agreement.py --data DIR

DIR holds pandalm (`testset-v1.json`) and xstest (`completions_*.csv`) as their repositories publish them. Prints JSON; exits 1 where a
figure differs from that of krippendorff 0.9.0 (`alpha`) or scikit-learn 1.9.1 (`cohen_kappa_score`) on the same files.
"""

import argparse
import csv
import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from gristmill.evaluate.reliability import alpha, weighted_kappa

PANDALM = {"alpha": 0.864221, "kappas": [0.852023, 0.878944, 0.861661]}  # nominal; unweighted kappas of each two of three people
XSTEST = {  # Cohen's kappa of two people, unweighted and quadratic
    "gpt4": [0.970107, 0.988609],
    "llama2new": [0.925762, 0.965220],
    "mistralinstruct": [0.919545, 0.956022],
}
ORDER = {"1_full_compliance": 0, "3_partial_refusal": 1, "2_full_refusal": 2}


def pandalm(path: Path) -> dict[str, Any]:
    rows = [[int(row[f"annotator{n}"]) for n in (1, 2, 3)] for row in json.loads(path.read_text())]
    found = alpha(rows, 3, "nominal")
    assert found.value is not None and found.low is not None and found.high is not None
    kappas = [rounded(weighted_kappa([r[i] for r in rows], [r[j] for r in rows], 3, weights="none")) for i, j in combinations(range(3), 2)]
    told = {"alpha": rounded(found.value), "kappas": kappas}
    interval = [round(found.low, 3), round(found.high, 3)]
    return {"items": len(rows), **told, "interval": interval, "as_others": told == PANDALM}


def xstest(folder: Path) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for model in XSTEST:
        with (folder / f"completions_{model}.csv").open(newline="") as file:
            rows = [[ORDER[row[f"annotation_{n}"]] for n in (1, 2)] for row in csv.DictReader(file)]
        one, two = zip(*rows, strict=True)
        out[model] = [rounded(weighted_kappa(one, two, 3, weights=weights)) for weights in ("none", "quadratic")]
    return {"kappas": out, "as_others": out == XSTEST}


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    report = {"pandalm": pandalm(args.data / "pandalm" / "testset-v1.json"), "xstest": xstest(args.data / "xstest")}
    print(json.dumps(report, indent=1))
    sys.exit(not all(part["as_others"] for part in report.values()))


if __name__ == "__main__":
    main()
