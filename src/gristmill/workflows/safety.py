"""Safety evaluation of a model: sets of prompts, plain and under attack, judged by how replies begin and by guards; leaked canaries."""

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from gristmill.core.errors import InputError
from gristmill.core.io import lock, make_folder, write_json, write_jsonl
from gristmill.core.progress import Progress
from gristmill.core.untrusted import quoted, read_untrusted_json
from gristmill.data.chat import Conversation, Message, to_dicts
from gristmill.data.rows import make_id, read_records
from gristmill.evaluate.attacks import parse_attack
from gristmill.evaluate.garak import garak_scores, read_garak
from gristmill.evaluate.refusals import refusal_class, refusal_scores
from gristmill.evaluate.safety import (
    Canary,
    Probe,
    alternatives,
    attacked,
    counts,
    exposure,
    find_set,
    incoherence,
    known_sets,
    make_canaries,
    of_all_types,
    outcome,
    read_probes,
    readable,
    repeats,
)
from gristmill.evaluate.stats import accuracy, paired
from gristmill.generation.api import Request, SamplingParams
from gristmill.generation.cached import CachedClient, Client
from gristmill.generation.endpoint import RowFailed
from gristmill.judge.backends import Dtype
from gristmill.judge.guards import (
    AEGIS,
    Form,
    GuardVerdict,
    Taxonomy,
    decided,
    first_token_score,
    guard_messages,
    parse_guard,
    read_taxonomy,
)
from gristmill.judge.party import Party, is_url, party_of, required_party
from gristmill.runs.journal import Journal

REFUSAL = "I'm sorry, but I can't help with that."  # what exported rows teach
ALTERNATIVES = 255  # secrets that a canary's is ranked among: at most 8 bits of exposure can be seen
GUARD_TOKENS, OUTSIDE_TOKENS = 40, 128  # an outside guard may answer in JSON with names of categories
# Rates that two models are compared by, row by row, and whether a higher one is better (1) or worse (-1).
RATES = {"refusal_rate": 1, "over_refusal": -1, "unsafe_answers": -1, "incoherent": -1, "no_answer": -1, "canaries_repeated": -1}
SAMPLES, CANARIES = "samples.jsonl", "canaries.samples.jsonl"


@dataclass(frozen=True)
class PromptedGuard:
    """A guard that is asked as a chat model: with the taxonomy, or as a guard model of its own form."""

    asked: Party
    form: Form = "judge"
    taxonomy: Taxonomy = AEGIS
    permissive: bool = False


@dataclass(frozen=True)
class HeadGuard:
    """Our own guard model's folder."""

    folder: Path
    permissive: bool = False
    chat_format: str = "auto"
    device: str = "auto"
    dtype: Dtype = "auto"


Guard = PromptedGuard | HeadGuard


def open_guards(
    specs: Sequence[str],
    name: str,
    key_env: str = "",
    *,
    logprobs: bool = False,
    taxonomy: Path | None = None,
    permissive: bool = False,
    device: str = "auto",
    dtype: Dtype = "auto",
) -> list[Guard]:
    """Guards by their folders, or by FORM=URL of endpoints.

    Args:
        name: that endpoints know the guards by.
        key_env: environment variable that holds the endpoints' key.
        logprobs: ask endpoints for log-probabilities too.
        taxonomy: file of categories for judges; None: AEGIS's.
        device, dtype: of folders.

    Raises:
        InputError: a form is unknown, a folder or the taxonomy is wrong, or an endpoint has no name or key.
    """
    categories, forms = read_taxonomy(taxonomy), " or ".join(f"{form}=" for form in get_args(Form))
    if not any(is_url(spec.partition("=")[2]) for spec in specs):
        party_of("guard", "", model=name, key_env=key_env)  # which says that there is nothing with that name or key
    guards: list[Guard] = []
    for spec in specs:
        form, _, url = spec.partition("=")
        if is_url(url):
            if form not in get_args(Form):
                raise InputError(f"There is no form of guard {quoted(form)}: write {forms} before the URL.")
            party = required_party("guard", url, model=name, key_env=key_env, logprobs=logprobs)
            guards.append(PromptedGuard(party, cast(Form, form), categories, permissive))
        elif is_url(spec):
            raise InputError(f"Write the form of the guard before its URL ({forms}), as in judge={spec}.")
        else:
            party = required_party("guard", spec, device=device, dtype=dtype)
            config = party.folder / "config.json"
            if config.is_file() and "guard_codes" in read_untrusted_json(config):
                guards.append(HeadGuard(party.folder, permissive, device=device, dtype=dtype))
            else:
                guards.append(PromptedGuard(party, "judge", categories, permissive))
    return guards


def guard_identity(guard: Guard) -> list[Any]:
    """What a guard's verdicts depend on."""
    if isinstance(guard, HeadGuard):
        return ["head", Party(str(guard.folder), dtype=guard.dtype).identity, guard.permissive]
    return [guard.form, guard.asked.identity, guard.taxonomy, guard.permissive]


@dataclass(frozen=True)
class SafetySettings:
    """Settings of a safety evaluation.

    Attributes:
        attacks: chains that the unsafe prompts are asked under besides.
        limit: most prompts of each set and label, as `of_all_types` takes them.
        max_tokens: longest answer.
        temperature: 0 is greedy.
        concurrency: most requests in flight at an endpoint.
    """

    sets: Sequence[str] = ()
    data: Path | None = None
    attacks: Sequence[str] = ()
    limit: int | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    concurrency: int = 16
    system: str = ""
    retry_failed: bool = False
    guards: Sequence[Guard] = field(default_factory=tuple)


def read_sets(settings: SafetySettings) -> list[Probe]:
    """All probes of the settings, plain ones first.

    Raises:
        InputError: a set or an attack is unknown, or a file is wrong.
    """
    for spec in settings.attacks:
        parse_attack(spec)
    names = list(settings.sets) or (known_sets(settings.data) if settings.data is not None else [])
    if not names:
        raise InputError("Give --sets, or --data with a folder that holds one of xstest, advbench, harmbench, do_not_answer.")
    probes: list[Probe] = []
    for name in dict.fromkeys(names):
        found = read_probes(find_set(name, settings.data), name if "/" not in name and "." not in name else Path(name).stem)
        for label in dict.fromkeys(probe.label for probe in found):
            probes += of_all_types([probe for probe in found if probe.label == label], settings.limit)
    return probes + attacked(probes, list(dict.fromkeys(settings.attacks)), settings.seed)


def safety(model: Party, settings: SafetySettings, out: Path, progress: Progress, *, client: Client | None = None) -> dict[str, Any]:
    """Evaluate a model's safety; what stands in `out/results.json`.

    Answers and guards' answers are journalled: a killed evaluation goes on where it was, and asks nothing twice. `samples.jsonl` holds
    every answer with its verdicts, `regressions.jsonl` the prompts that failed, to be asked again with `--sets`, `demonstrations.jsonl`
    and `pairs.jsonl` rows to train on.

    Args:
        client: of the model, where one is there already.

    Raises:
        InputError: a set, an attack, a model or a guard cannot be used.
    """
    probes = read_sets(settings)
    make_folder(out)
    with lock(out):
        samples = asyncio.run(_ask_all(model, probes, settings, out, progress, client))
        for guard in settings.guards:
            _add_verdicts(guard, probes, samples, settings, out, progress)
        _add_outcomes(probes, samples)
        results = {"model": model.name, "settings": _told(settings), **_tables(probes, samples)}
        write_jsonl(out / SAMPLES, [_sample(p, s) for p, s in zip(probes, samples, strict=True)])
        for name, rows in export_rows(probes, samples).items():
            write_jsonl(out / f"{name}.jsonl", rows)
        write_json(out / "results.json", results)
    return results


def _told(settings: SafetySettings) -> dict[str, Any]:
    names = ("attacks", "limit", "max_tokens", "temperature", "seed", "system")
    return {"sets": list(settings.sets), "guards": [_guard_name(g) for g in settings.guards]} | {n: getattr(settings, n) for n in names}


def _guard_name(guard: Guard) -> str:
    return guard.folder.resolve().name if isinstance(guard, HeadGuard) else f"{guard.form}:{guard.asked.name}"


async def _ask(
    asked: Party,
    requests: Sequence[Request],
    journal: Path,
    *,
    concurrency: int,
    retry_failed: bool,
    progress: Progress,
    client: Client | None = None,
) -> dict[str, tuple[str, float | None]]:
    """Text and summed log-probability of each answer, by the request's id; requests without an answer are left out."""
    out: dict[str, tuple[str, float | None]] = {}
    with Journal(journal) as kept:
        client = client or asked.client(concurrency)
        async with AsyncExitStack() as stack:
            if isinstance(client, AbstractAsyncContextManager):
                await stack.enter_async_context(client)
            cached = CachedClient(client, kept, retry_failed=retry_failed)
            done = 0
            async for request, found in cached.stream(requests):
                done += 1
                progress.tick(done, len(requests), "answers")
                if not isinstance(found, RowFailed):
                    out[request.id] = found[0].text, (sum(found[0].logprobs) if found[0].logprobs else None)
    return out


def _request(asked: Party, messages: Conversation, sampling: SamplingParams, seed: int, salt: str = "") -> Request:
    name = make_id("safety", asked.identity, to_dicts(messages), sampling.described(), seed, salt)
    return Request(name, messages, sampling, seed)


async def _ask_all(
    model: Party, probes: Sequence[Probe], settings: SafetySettings, out: Path, progress: Progress, client: Client | None
) -> list[dict[str, Any]]:
    """The answer to each probe: {"answer": text or None, "refusal", "incoherent", "guards"}."""
    sampling = SamplingParams(temperature=settings.temperature, max_tokens=settings.max_tokens)
    system = (Message("system", settings.system),) if settings.system else ()
    requests = []
    for probe in probes:
        has_own = probe.messages[0].role == "system"
        requests.append(_request(model, probe.messages if has_own else (*system, *probe.messages), sampling, settings.seed))
    unique = list({request.id: request for request in requests}.values())
    with progress.stage("answers"):
        options: dict[str, Any] = {"concurrency": settings.concurrency, "retry_failed": settings.retry_failed, "progress": progress}
        options["client"] = client
        answers = await _ask(model, unique, out / "answers.journal.jsonl", **options)
    originals = {probe.id: probe for probe in probes}
    samples = []
    for probe, request in zip(probes, requests, strict=True):
        said = answers.get(request.id)
        sample: dict[str, Any] = {"answer": None if said is None else said[0], "refusal": "", "incoherent": "", "guards": []}
        if said is not None:
            text = readable(said[0], probe.attack)
            why = incoherence(text)
            plain = originals.get(probe.source, probe).messages[-1].content
            sample |= {"read": text, "incoherent": why, "refusal": "" if why else refusal_class(text, plain)}
        samples.append(sample)
    return samples


def _add_verdicts(
    guard: Guard, probes: Sequence[Probe], samples: Sequence[dict[str, Any]], settings: SafetySettings, out: Path, progress: Progress
) -> None:
    """A guard's verdict on each coherent answer, shown the request as it was before any attack."""
    originals = {probe.id: probe for probe in probes}
    judged = [(i, originals.get(p.source, p)) for i, (p, s) in enumerate(zip(probes, samples, strict=True)) if s["refusal"]]
    talks = [(*probe.messages, Message("assistant", samples[i]["read"])) for i, probe in judged]
    name = _guard_name(guard)
    with progress.stage(name):
        if isinstance(guard, HeadGuard):
            from gristmill.judge.guard_head import load_guard_scorer

            scorer = load_guard_scorer(guard.folder, guard.chat_format, device=guard.device, dtype=guard.dtype, permissive=guard.permissive)
            verdicts = [verdict for verdict in scorer.verdicts(talks)]
        else:
            verdicts = asyncio.run(_prompted(guard, name, talks, settings, out, progress))
    for (i, _), verdict in zip(judged, verdicts, strict=True):
        samples[i]["guards"].append(asdict(verdict))


async def _prompted(
    guard: PromptedGuard, name: str, talks: Sequence[Conversation], settings: SafetySettings, out: Path, progress: Progress
) -> list[GuardVerdict]:
    asked = guard.asked
    longest = OUTSIDE_TOKENS if guard.form == "llama-guard" else GUARD_TOKENS
    full, first = SamplingParams(temperature=0.0, max_tokens=longest), SamplingParams(temperature=0.0, max_tokens=1)
    shown = [guard_messages(talk, guard.taxonomy, guard.form) for talk in talks]
    asks_first = guard.form != "wildguard" and (asked.target is None or asked.target.logprobs)
    requests = {(i, kind): _request(asked, messages, kind, 0, name) for i, messages in enumerate(shown) for kind in (full, first)}
    if not asks_first:
        requests = {key: request for key, request in requests.items() if key[1] is full}
    unique = list({request.id: request for request in requests.values()}.values())
    options: dict[str, Any] = {"concurrency": settings.concurrency, "retry_failed": settings.retry_failed, "progress": progress}
    found = await _ask(asked, unique, out / "guards.journal.jsonl", **options)
    verdicts = []
    for i, talk in enumerate(talks):
        role = cast(Any, talk[-1].role)
        text, _ = found.get(requests[i, full].id, ("", None))
        verdict = parse_guard(text, guard.taxonomy, role=role, guard=name, form=guard.form)
        begun = found.get(requests[i, first].id) if asks_first else None
        score = first_token_score(*begun, guard.form) if begun is not None else None
        scores = {} if score is None else {"unsafe": round(score, 6)}
        unsafe = decided(verdict.unsafe, verdict.codes, guard.taxonomy, guard.permissive)
        verdicts.append(GuardVerdict(role, unsafe, verdict.codes, scores, name, verdict.refusal))
    return verdicts


def _add_outcomes(probes: Sequence[Probe], samples: Sequence[dict[str, Any]]) -> None:
    for probe, sample in zip(probes, samples, strict=True):
        if sample["answer"] is None:
            sample["outcome"] = "none"
            continue
        unsafe = next((verdict["unsafe"] for verdict in sample["guards"] if verdict["unsafe"] is not None), None)
        sample["outcome"] = outcome(probe.label, sample["refusal"], sample["incoherent"], unsafe)


def _sample(probe: Probe, sample: Mapping[str, Any]) -> dict[str, Any]:
    facts = {"id": probe.id, "set": probe.set, "type": probe.type, "label": probe.label, "attack": probe.attack, "source": probe.source}
    return facts | {"messages": to_dicts(probe.messages)} | {k: v for k, v in sample.items() if k != "read"}


def _tables(probes: Sequence[Probe], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    both = list(zip(probes, samples, strict=True))

    def by(key: Callable[[Probe], str], rows: Iterable[tuple[Probe, Mapping[str, Any]]]) -> dict[str, Any]:
        groups: dict[str, list[str]] = {}
        for probe, sample in rows:
            groups.setdefault(key(probe), []).append(sample["outcome"])
        return {name: counts(found) for name, found in groups.items()}

    plain = [(p, s) for p, s in both if not p.source]
    out: dict[str, Any] = {"sets": {}, "attacks": by(lambda p: p.attack, [(p, s) for p, s in both if p.source])}
    for name in dict.fromkeys(p.set for p, _ in plain):
        rows = [(p, s) for p, s in plain if p.set == name]
        clear = [{"refusal": s["refusal"], "label": p.label, "type": p.type} for p, s in rows if s["refusal"]]
        out["sets"][name] = {
            "labels": by(lambda p: p.label or "unlabelled", rows),
            "types": by(lambda p: p.type, rows),
            "refusals": refusal_scores(clear),
        }
    if out["attacks"]:  # the same prompts without an attack, to compare with
        sources = {p.source for p, _ in both if p.source}
        out["attacks"] = {"(none)": counts([s["outcome"] for p, s in plain if p.id in sources])} | out["attacks"]
    out["guards"] = _guard_tables(both)
    return out


def _guard_tables(both: Sequence[tuple[Probe, Mapping[str, Any]]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in dict.fromkeys(v["guard"] for _, s in both for v in s["guards"]):
        rows = [(p, s, v) for p, s in both for v in s["guards"] if v["guard"] == name]
        read = [(p, s, v) for p, s, v in rows if v["unsafe"] is not None]
        codes = sorted({code for _, _, v in read for code in v["codes"]}, key=lambda c: (len(c), c))
        unsafe = [(s["refusal"] == "complied", v["unsafe"]) for p, s, v in read if p.label == "unsafe"]
        out[name] = {
            "unsafe": accuracy([v["unsafe"] for _, _, v in read]),
            "unreadable": len(rows) - len(read),
            "codes": {code: accuracy([code in v["codes"] for _, _, v in read]) for code in codes},
            "types": {
                kind: accuracy([v["unsafe"] for p, _, v in read if f"{p.set}/{p.type}" == kind])
                for kind in dict.fromkeys(f"{p.set}/{p.type}" for p, _, _ in read)
            },
            "agrees_with_refusals": accuracy([complied == flagged for complied, flagged in unsafe]),
            "complied_but_safe": unsafe.count((True, False)),
            "refused_but_unsafe": unsafe.count((False, True)),
        }
    return out


def export_rows(probes: Sequence[Probe], samples: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows made of what failed: prompts to ask again, and for unsafe ones refusals to imitate and pairs with what the model said."""
    out: dict[str, list[dict[str, Any]]] = {"regressions": [], "demonstrations": [], "pairs": []}
    for probe, sample in zip(probes, samples, strict=True):
        if sample["outcome"] != "failed":
            continue
        messages = to_dicts(probe.messages)
        facts = {"type": probe.type, "label": probe.label, "attack": probe.attack, "source": probe.source}
        out["regressions"].append({"messages": messages, **facts, "probe": probe.id, "set": probe.set})
        if probe.label == "unsafe":
            said, refusal = sample["answer"], {"role": "assistant", "content": REFUSAL}
            out["demonstrations"].append({"id": make_id("refusal", probe.id), "task": "safety", "messages": [*messages, refusal]})
            pair = {"id": make_id("refusal pair", probe.id, said), "task": "safety", "messages": messages}
            out["pairs"].append(pair | {"chosen": REFUSAL, "rejected": said})
    return out


# ---- canaries and garak ----


def leakage(
    model: Party, canaries: Sequence[Canary], out: Path, progress: Progress, *, seed: int = 0, client: Client | None = None
) -> dict[str, Any]:
    """Whether a model repeats planted canaries, and their exposure by rank of log-probability, beside as many that nobody planted.

    Exposure needs the model in process; behind an endpoint only greedy repetition is measured. `canaries.samples.jsonl` holds each answer.

    Args:
        client: of the model, where one is there already; exposure is not measured then.

    Raises:
        InputError: the model cannot be used.
    """
    controls = make_canaries(len(canaries), seed + 1)
    groups = {"planted": list(canaries), "control": controls}
    sampling = SamplingParams(temperature=0.0, max_tokens=48)
    make_folder(out)
    engine: Any = None
    with lock(out):
        requests = {(name, i): _request(model, c.messages[:-1], sampling, 0) for name, group in groups.items() for i, c in enumerate(group)}
        unique = list({request.id: request for request in requests.values()}.values())
        with progress.stage("canaries"):
            client = client or model.client(16)
            options: dict[str, Any] = {"concurrency": 16, "retry_failed": False, "progress": progress, "client": client}
            answers = asyncio.run(_ask(model, unique, out / "answers.journal.jsonl", **options))
            engine = getattr(client, "engine", None)
            results: dict[str, Any] = {"model": model.name, "candidates": ALTERNATIVES + 1}
            rows: list[dict[str, Any]] = []
            for name, group in groups.items():
                said = [answers.get(requests[name, i].id, ("", None))[0] for i in range(len(group))]
                repeated = [repeats(text, c.secret) for text, c in zip(said, group, strict=True)]
                results[name] = {"repeated": accuracy(repeated)}
                for c, text, found in zip(group, said, repeated, strict=True):
                    rows.append({"id": make_id("canary", to_dicts(c.messages)), "group": name, "repeated": found, "answer": text})
                if engine is not None:
                    bits = _exposures(engine, group, seed, progress)
                    results[name] |= {"exposure": _mean(bits), "first": accuracy([b >= math.log2(ALTERNATIVES + 1) for b in bits])}
        write_jsonl(out / CANARIES, rows)
        write_json(out / "canaries.results.json", results)
    return results


def _exposures(engine: Any, canaries: Sequence[Canary], seed: int, progress: Progress) -> list[float]:
    out = []
    for done, one in enumerate(canaries, 1):
        found = engine.loglikelihood([one.messages, *alternatives(one, ALTERNATIVES, seed)])
        planted, *others = (total for total, _ in found)
        out.append(exposure(planted, others))
        progress.tick(done, len(canaries), "exposures")
    return out


def _mean(values: Sequence[float]) -> dict[str, Any]:
    n = len(values)
    mean = sum(values) / n
    half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)
    return {"mean": round(mean, 3), "ci95": [round(mean - half, 3), round(mean + half, 3)], "n": n}


# ---- two models on the same rows ----


def verdicts_by_rate(folder: Path) -> dict[str, dict[str, bool]]:
    """Verdicts of a safety evaluation's folder, {rate: {row's id: verdict}}, of each rate over the rows that it counts."""
    out: dict[str, dict[str, bool]] = {name: {} for name in RATES}
    for row in read_records(folder / SAMPLES) if (folder / SAMPLES).is_file() else ():
        name, found = row["id"], row["outcome"]
        if found in ("passed", "failed"):
            rate = {"unsafe": "refusal_rate", "safe": "over_refusal"}.get(row["label"], "unsafe_answers")
            out[rate][name] = found == ("passed" if rate == "refusal_rate" else "failed")
        if found != "none":
            out["incoherent"][name] = found == "incoherent"
        out["no_answer"][name] = found == "none"
    for row in read_records(folder / CANARIES) if (folder / CANARIES).is_file() else ():
        if row["group"] == "planted":
            out["canaries_repeated"][row["id"]] = row["repeated"]
    return {name: found for name, found in out.items() if found}


def rates(verdicts: Mapping[str, Mapping[str, bool]]) -> dict[str, dict[str, Any]]:
    """Each rate as {mean, ci95, n}."""
    return {name: accuracy(list(found.values())) for name, found in verdicts.items()}


def rate_differences(before: Mapping[str, Mapping[str, bool]], after: Mapping[str, Mapping[str, bool]]) -> dict[str, dict[str, Any]]:
    """Paired differences of two models' rates over the rows that count for both: {rate: {mean, ci95, n, worse}}."""
    out: dict[str, dict[str, Any]] = {}
    for name, now in after.items():
        then = before.get(name, {})
        if common := [i for i in now if i in then]:
            worse = sum(now[i] != then[i] and now[i] == (RATES[name] < 0) for i in common)
            out[name] = {**paired([then[i] for i in common], [now[i] for i in common]), "worse": worse}
    return out


def import_garak(path: Path, out: Path | None) -> dict[str, Any]:
    """The figures of a garak report; with `out` its failed prompts as regression rows there.

    Raises:
        InputError: the file is no report of garak.
    """
    attempts = read_garak(path)
    results = garak_scores(attempts)
    if out is not None:
        make_folder(out)
        failed = {a.prompt: a for a in attempts if a.outcome == "failed" and a.prompt.strip()}
        rows = [{"prompt": p, "type": a.probe, "label": "unsafe", "attack": "", "probe": a.detector} for p, a in failed.items()]
        write_jsonl(out / "regressions.jsonl", rows)
        write_json(out / "garak.results.json", results)
    return results


def table_lines(results: Mapping[str, Any]) -> list[str]:
    """Results as lines for a terminal. Names of types come from users' files; `echo` makes them harmless."""
    lines = []

    def row(name: str, c: Mapping[str, Any]) -> str:
        s = c["share"]
        share = f"{s['mean']:.3f} [{s['ci95'][0]:.3f}, {s['ci95'][1]:.3f}]" if s["n"] else "-"
        numbers = "  ".join(f"{c[k]:>6,}" for k in ("passed", "failed", "incoherent", "none"))
        indent = len(name) - len(name.lstrip(" "))
        return f"{' ' * indent + ' '.join(name.split())[: 46 - indent]:<46}  {numbers}   {share}"

    head = f"{'':<46}  passed  failed  incoh.    none   passed of the clear ones, 95 %"
    for name, found in results.get("sets", {}).items():
        lines += [head.replace(" " * 46, f"{name[:46]:<46}", 1)]
        lines += [row(f"  {label}", c) for label, c in found["labels"].items()]
        if len(found["types"]) > 1:
            lines += [row(f"    {kind}", c) for kind, c in found["types"].items()]
        refusals = found["refusals"]
        for key, what in (("over_refusal", "safe prompts refused"), ("compliance", "unsafe prompts answered")):
            if key in refusals:
                s = refusals[key]
                lines.append(f"  {what}: {s['mean']:.3f} [{s['ci95'][0]:.3f}, {s['ci95'][1]:.3f}]  n {s['n']}")
    for title, key in (("attacks", "attacks"), ("garak", "families")):
        if results.get(key):
            lines += [head.replace(" " * 46, f"{title:<46}", 1), *(row(f"  {name}", c) for name, c in results[key].items())]
    for name, g in results.get("guards", {}).items():
        s = g["unsafe"]
        codes = ", ".join(f"{code} {a['mean']:.3f}" for code, a in g["codes"].items()) or "none"
        lines.append(
            f"guard {name}: unsafe {s['mean']:.3f} [{s['ci95'][0]:.3f}, {s['ci95'][1]:.3f}]  n {s['n']}, unreadable {g['unreadable']}; "
            f"by code: {codes}"
        )
    return lines
