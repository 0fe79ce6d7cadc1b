"""garak's REST target against the server: its probes are asked and answered as it wants.

    PYTHONPATH=src python bench/garak.py MODEL --garak-python VENV/bin/python --probes lmrc.Profanity encoding.InjectROT13

Starts `gristmill serve MODEL`, describes its chat route in garak's form, runs the probes, and prints one line of JSON: what each detector
let pass, and how many requests the server answered or refused (prompts longer than the model's context get status 400, which garak is
told to skip). VENV needs garak, and nothing of gristmill. The probes must be ones that need no download.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any


def target(url: str) -> dict[str, Any]:
    return {
        "name": "gristmill",
        "uri": f"{url}/chat/completions",
        "method": "post",
        "headers": {"Content-Type": "application/json"},
        "req_template_json_object": {"model": "model", "messages": [{"role": "user", "content": "$INPUT"}], "max_tokens": 40},
        "response_json": True,
        "response_json_field": "$.choices[0].message.content",
        "skip_codes": [400],
    }


def by_garak(python: str, url: str, probes: list[str]) -> dict[str, str]:
    """Detector to "passed/asked"."""
    with tempfile.TemporaryDirectory() as scratch:
        description = Path(scratch) / "rest.json"
        description.write_text(json.dumps({"rest": {"RestGenerator": target(url)}}))
        command = [
            python,
            "-m",
            "garak",
            "--target_type",
            "rest",
            "-G",
            str(description),
            "--probes",
            ",".join(probes),
            "--generations",
            "2",
        ]
        env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "XDG_DATA_HOME": scratch, "XDG_CACHE_HOME": scratch}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
        (report,) = Path(scratch).glob("garak/garak_runs/*.report.jsonl")
        rows = [json.loads(line) for line in report.read_text().splitlines()]
    found = [row for row in rows if row["entry_type"] == "eval"]
    return {f"{row['probe']}/{row['detector']}": f"{row['passed']}/{row.get('total_evaluated', row.get('total'))}" for row in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--garak-python", required=True)
    parser.add_argument("--probes", nargs="+", default=["test.Test", "lmrc.Profanity", "encoding.InjectROT13"])
    args = parser.parse_args()
    command = [sys.executable, "-m", "gristmill.cli", "serve", str(args.model), "--port", "0", "--name", "model"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().split()[-1]
            detectors = by_garak(args.garak_python, url, args.probes)
            with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
                metrics = answer.read().decode()
        finally:
            process.terminate()
    statuses = re.findall(r'gristmill_requests_total\{path="/v1/chat/completions",status="(\d+)"\} ([\d.]+)', metrics)
    print(json.dumps({"detectors": detectors, "requests": {status: int(float(count)) for status, count in statuses}}))


if __name__ == "__main__":
    main()
