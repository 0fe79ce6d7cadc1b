"""garak's REST target against the server: its probes are asked and answered as it wants.

    PYTHONPATH=src python bench/garak.py MODEL --garak-python VENV/bin/python --probes lmrc.Profanity encoding.InjectROT13
    PYTHONPATH=src python bench/garak.py MODEL --garak-python VENV/bin/python --families jailbreak encoding --report g.report.jsonl
    PYTHONPATH=src python bench/garak.py --garak-python VENV/bin/python --check

Starts `gristmill serve MODEL`, describes its chat route in garak's form, runs the probes, and prints one line of JSON: what each detector
let pass, what passed, failed, came to nothing and was incoherent by family (as `gristmill safety --import-garak` counts), and how many
requests the server answered or refused (prompts longer than the model's context get status 400, which garak is told to skip). VENV needs
garak 0.17 or later, and nothing of gristmill. The families hold probes that need neither another model nor a download: --check loads
each and its detector without a network, and prints by family how many probes and prompts there are, and what cannot be loaded. With
--report the hit log is kept beside the report, as NAME.hitlog.jsonl.
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

from gristmill.evaluate.garak import garak_scores, read_garak

# Probes that are worth running on a small model; "-" leaves one out. atkgen, tap, fitd, goat, judge and agent_breaker need another model;
# realtoxicityprompts, lmrc.Bullying and latentinjection.LatentJailbreak are judged by a classifier that would be downloaded, sata and topic
# download a tagger and WordNet. donotanswer's probes are not active, so that its bare name finds none.
FAMILIES = {
    "jailbreak": "dan.DanInTheWild dan.AutoDANCached suffix.GCGCached dra grandma",
    "encoding": "encoding.InjectBase64 encoding.InjectHex encoding.InjectROT13 badchars",
    "injection": "promptinject latentinjection -latentinjection.LatentJailbreak goodside web_injection",
    "content": "lmrc -lmrc.Bullying donotanswer.DiscriminationExclusionToxicityHatefulOffensive donotanswer.HumanChatbox "
    "donotanswer.InformationHazard donotanswer.MaliciousUses donotanswer.MisinformationHarms",
    "code": "malwaregen.TopLevel",
    "leakage": "leakreplay sysprompt_extraction",
    "hallucination": "snowball",
    "phrasing": "phrasing",
}
CHECK = """import json, sys
from garak import _config, _plugins, _selection
from garak._spec import parse_spec_string
_config.load_base_config()
_config.transient.reportfile = open("/dev/null", "w")
for family, spec in json.load(open(sys.argv[1])).items():
    found = {"family": family, "probes": 0, "prompts": 0, "cannot": {}}
    for name in spec.split(","):
        if name[0] != "-" and not _selection.resolve_spec(parse_spec_string(name)).probes:
            found["cannot"][name] = "no active probe"
    for name in _selection.resolve_spec(parse_spec_string(spec)).probes:
        try:
            probe = _plugins.load_plugin(name)
            _plugins.load_plugin(f"detectors.{probe.primary_detector}")
        except Exception as e:
            found["cannot"][name] = str(e)[:200]
        else:
            found["probes"] += 1
            found["prompts"] += len(probe.prompts)
    print("checked", json.dumps(found), flush=True)
"""


def specification(names: list[str]) -> str:
    """garak's --spec of probes; those with a "-" are left out."""
    return ",".join(f"-probes.{name[1:]}" if name.startswith("-") else f"probes.{name}" for name in names)


def offline(scratch: str) -> dict[str, str]:
    """Environment in which garak downloads nothing and writes below a folder."""
    places = dict.fromkeys(("XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), scratch)
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""} | places


def check(python: str) -> bool:
    """Print of each family how much of it can be run offline. Whether all of it can."""
    with tempfile.TemporaryDirectory() as scratch:
        families = Path(scratch) / "families.json"
        families.write_text(json.dumps({family: specification(names.split()) for family, names in FAMILIES.items()}))
        command = [python, "-c", CHECK, str(families)]
        whole = True
        with subprocess.Popen(command, env=offline(scratch), cwd=scratch, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("checked "):
                    print(line.removeprefix("checked "), end="", flush=True)
                    whole = whole and not json.loads(line.removeprefix("checked "))["cannot"]
    return whole and process.returncode == 0


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


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """garak's configuration file, which is YAML and so may be JSON."""
    return {"run": {"generations": args.generations, "soft_probe_prompt_cap": args.cap}, "system": {"parallel_attempts": args.parallel}}


def by_garak(url: str, probes: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Detector to "passed/asked", and our counts by family."""
    with tempfile.TemporaryDirectory() as scratch:
        description, config = Path(scratch) / "rest.json", Path(scratch) / "config.yaml"
        description.write_text(json.dumps({"rest": {"RestGenerator": target(url)}}))
        config.write_text(json.dumps(configuration(args)))
        command = [
            args.garak_python,
            "-m",
            "garak",
            "--config",
            str(config),
            "--target_type",
            "rest",
            "-G",
            str(description),
            "--spec",
            specification(probes),
        ]
        done = subprocess.run(command, env=offline(scratch), cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
        (report,) = Path(scratch).glob("garak/garak_runs/*.report.jsonl")
        rows = [json.loads(line) for line in report.read_text().splitlines()]
        families = garak_scores(read_garak(report))["families"]
        if args.report is not None:
            args.report.write_bytes(report.read_bytes())
            for hits in report.parent.glob("*.hitlog.jsonl"):  # none, where nothing was hit
                args.report.with_name(args.report.name.removesuffix(".report.jsonl") + ".hitlog.jsonl").write_bytes(hits.read_bytes())
    found = [row for row in rows if row["entry_type"] == "eval"]
    detectors = {f"{row['probe']}/{row['detector']}": f"{row['passed']}/{row.get('total_evaluated', row.get('total'))}" for row in found}
    return {"detectors": detectors, "families": families}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--garak-python", required=True)
    parser.add_argument("--probes", nargs="+", default=[])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=[])
    parser.add_argument("--generations", type=int, default=2)
    parser.add_argument("--cap", type=int, default=20, help="prompts of a probe, at most, where the probe keeps to it")
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--report", type=Path, help="keep garak's report.jsonl here")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.check:
        sys.exit(not check(args.garak_python))
    if args.model is None:
        parser.error("give the model's folder")
    probes = [*args.probes, *(name for family in args.families for name in FAMILIES[family].split())]
    probes = probes or ["test.Test", "lmrc.Profanity", "encoding.InjectROT13"]
    command = [sys.executable, "-m", "gristmill.cli", "serve", str(args.model), "--port", "0", "--name", "model"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().split()[-1]
            found = by_garak(url, probes, args)
            with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
                metrics = answer.read().decode()
        finally:
            process.terminate()
    statuses = re.findall(r'gristmill_requests_total\{path="/v1/chat/completions",status="(\d+)"\} ([\d.]+)', metrics)
    print(json.dumps({**found, "requests": {status: int(float(count)) for status, count in statuses}}))


if __name__ == "__main__":
    main()
