"""Session of a judged benchmark: who is asked, the folder of journals, and what is counted on the way."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from gristmill.core.concurrent import map_concurrent
from gristmill.core.config import read
from gristmill.core.errors import InputError
from gristmill.core.io import lock, make_folder, read_json, write_json
from gristmill.core.progress import Progress
from gristmill.core.untrusted import quoted, quoted_path
from gristmill.data.chat import Conversation, to_dicts
from gristmill.data.rows import make_id
from gristmill.evaluate.model_answers import ModelAnswers, read_answers
from gristmill.generation.api import Completion, SamplingParams
from gristmill.generation.api import Request as ApiRequest
from gristmill.generation.cached import CachedClient
from gristmill.generation.endpoint import RowFailed
from gristmill.generation.mixture import opened, shown
from gristmill.judge.party import Party
from gristmill.model.folder import folder_stamps
from gristmill.runs.journal import Journal

Kind = Literal["mt-bench", "arena-hard", "alpaca-eval", "agreement", "rewards"]
MARKER, RESULTS, SAMPLES = "judge.json", "results.json", "samples.jsonl"
ANSWER_CALLS, VERDICT_CALLS, RATING_CALLS = "answer-calls.jsonl", "verdict-calls.jsonl", "rating-calls.jsonl"
RATED_AT_ONCE = 64  # conversations that a reward model in process rates between two lines of the journal
Item = TypeVar("Item")
Result = TypeVar("Result")
Ask = Callable[[Conversation, SamplingParams], Awaitable[Completion | None]]
Prepared = Callable[[], tuple[dict[str, Any], list[dict[str, Any]]]]  # what is left to do when all files have been read


@dataclass(frozen=True, kw_only=True)
class JudgeArgs:
    """What a judged benchmark is run with.

    Attributes:
        data: the benchmark's file, or a folder that holds it.
        out: folder of journals and results.
        model: whose answers are judged, where they are to be asked for.
        answers: a file of them instead.
        judge: None where the verdicts are in the file.
        baseline: a file of the baseline's answers.
        references: MT-Bench's file of reference answers.
        is_reward: whether the judge is a reward model; None: as its folder says, and no for an endpoint.
        weights: named set of aggregation weights of a reward model behind an endpoint.
        explain: let a pairwise judge explain itself first.
        greedy: answers at temperature 0 throughout.
        max_tokens, judge_tokens: longest answer and reply; None: the protocol's.
        limit: most questions (of each subset).
    """

    data: Path
    out: Path
    model: Party | None = None
    answers: Path | None = None
    judge: Party | None = None
    baseline: Path | None = None
    references: Path | None = None
    is_reward: bool | None = None
    weights: str = "nemotron4-340b"
    explain: bool = False
    greedy: bool = False
    max_tokens: int | None = None
    judge_tokens: int | None = None
    limit: int | None = None
    seed: int = 0
    concurrency: int = 64
    retry_failed: bool = False


class JudgedSession:
    """One run: who is asked, the folder, and what is counted on the way."""

    def __init__(self, kind: Kind, args: JudgeArgs, progress: Progress):
        self.kind, self.args, self.progress = kind, args, progress
        self.failed = self.num_replies = self.unreadable = self.num_cut = self.unreadable_cut = 0
        self.first_unreadable = ""
        self.model_name = ""

    def head(self) -> dict[str, Any]:
        judge = self.args.judge
        settings = {name: getattr(self.args, name) for name in ("limit", "seed", "greedy", "explain", "max_tokens", "judge_tokens")}
        return {"model": self.model_name or None, "judge": judge.name if judge else None, "settings": settings}

    def folder(self) -> Any:
        """The folder of the run, locked: an empty one, or one of an earlier start of the same benchmark."""
        out = self.args.out
        if out.exists() and not out.is_dir():
            raise InputError(f"{quoted_path(out)} is not a folder: choose another with --out.")
        marker = out / MARKER
        if marker.is_file():
            if (known := read_json(marker).get("kind")) != self.kind:
                raise InputError(f"{quoted_path(out)} holds a run of `gristmill judge {known}`: choose another --out.")
        elif out.is_dir() and any(out.iterdir()):
            raise InputError(f"{quoted_path(out)} is not empty and holds no run: choose another folder with --out.")
        make_folder(out)
        file = lock(out)
        if not marker.is_file():
            write_json(marker, {"kind": self.kind})
        return file

    # ---- asking ----

    def answer(
        self,
        party: Party,
        items: Sequence[Item],
        work: Callable[[Ask, Item], Awaitable[Result]],
        *,
        calls: str,
        what: str,
        logprobs: bool = False,
    ) -> list[Result]:
        """What `work` makes of each item by asking a model, in the items' order; many at a time, through the journal."""
        args, progress = self.args, self.progress
        identity = call_identity(party)
        client = replace(party, logprobs=logprobs).client(args.concurrency)
        first_error = ""

        async def all_of_them() -> list[Result]:
            with Journal(args.out / calls) as journal:
                cached = CachedClient(client, journal, retry_failed=args.retry_failed)

                async def ask(messages: Conversation, sampling: SamplingParams) -> Completion | None:
                    nonlocal first_error
                    name = make_id(identity, to_dicts(messages), sampling.described(), args.seed)
                    try:
                        completion = (await cached.complete(ApiRequest(name, messages, sampling, args.seed)))[0]
                        self.num_cut += calls == ANSWER_CALLS and completion.finish == "length"
                        return completion
                    except RowFailed as e:
                        first_error = first_error or str(e)
                        return None

                async def one(place: int) -> tuple[int, Result]:
                    return place, await work(ask, items[place])

                found: dict[int, Result] = {}
                async with opened(client), shown(cached, progress.tick):
                    async for place, result in map_concurrent(range(len(items)), one, min(2 * client.concurrency, max(1, len(items)))):
                        found[place] = result
                        if party.is_endpoint is False:
                            progress.tick(len(found), len(items), what)
                self.failed += cached.failed
                if cached.failed and cached.failed == cached.calls:
                    raise InputError(
                        f"{quoted(party.name)} answered none of {cached.calls} calls ({first_error}): see to it, and run again."
                    )
                return [found[place] for place in range(len(items))]

        with progress.stage(what):
            return asyncio.run(all_of_them())

    def read(self, verdict: Any, completion: Completion | None) -> Any:
        """Count a reply by whether it could be read."""
        if completion is not None:
            self.num_replies += 1
            if verdict is None or verdict == "":
                self.unreadable += 1
                self.unreadable_cut += completion.finish == "length"
                self.first_unreadable = self.first_unreadable or completion.text.strip()
        return verdict

    @property
    def counts(self) -> dict[str, int]:
        return {"replies": self.num_replies, "unreadable": self.unreadable}

    @property
    def judge(self) -> Party:
        if self.args.judge is None:
            raise InputError(f"{self.kind} needs a judge: give a model folder or the base URL of an endpoint with --judge.")
        return self.args.judge

    def judging(self, tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=self.args.judge_tokens or tokens)

    def answers_of(self) -> ModelAnswers | None:
        """The model's answers where a file holds them."""
        if self.args.answers is None:
            assert self.args.model is not None
            self.model_name = self.args.model.name
            return None
        found = read_answers(self.args.answers)
        self.model_name = found.model
        return found

    def limited(self, items: Sequence[Item], key: Callable[[Item], str] = lambda item: "") -> list[Item]:
        """The first items, of each subset as many as `--limit` says."""
        if self.args.limit is None:
            return list(items)
        seen: dict[str, int] = {}
        kept = []
        for item in items:
            seen[key(item)] = seen.get(key(item), 0) + 1
            if seen[key(item)] <= self.args.limit:
                kept.append(item)
        return kept

    def notes(self) -> list[str]:
        """What must be said of judge and model beside the scores."""
        model, judge = self.args.model, self.args.judge
        out = [f"{self.num_cut} answers were cut off before their end: raise --max-tokens, or judge them so."] if self.num_cut else []
        if self.unreadable_cut:
            out.append(f"{self.unreadable_cut} of the replies that cannot be read were cut off before their end: raise --judge-tokens.")
        if 2 * self.unreadable > self.num_replies:
            out.append("Most replies cannot be read, and the scores are of few: take a judge that keeps to the form.")
        if model is None or judge is None:
            return out
        if identity_of(model) == identity_of(judge):
            return [*out, "The judge is the model itself: judges favour their own answers."]
        return out + _has_filtered(model, judge)


def identity_of(party: Party) -> list[Any]:
    """Who a party is: an endpoint's model by its name, a folder's by its files."""
    return [party.name] if party.is_endpoint else [party.name, folder_stamps(party.folder)]


def call_identity(party: Party) -> list[Any]:
    """What decides what a party says: who it is, and the chat format and type that it is given in place of its own."""
    return identity_of(party) + [given for given in (party.chat_format, party.dtype) if given != "auto"]


def _has_filtered(model: Party, judge: Party) -> list[str]:
    """A sentence where the recipe of the run that a model folder lies in names the judge."""
    for folder in model.folder.resolve().parents[:2] if not model.is_endpoint else ():
        recipe = folder / "recipe.yaml"
        if recipe.is_file():
            try:
                text = read(recipe)
            except InputError:
                continue
            known = {judge.model} if judge.is_endpoint else {judge.place, str(judge.folder.resolve())}
            if known & set(_strings(text)) or (not judge.is_endpoint and folder in judge.folder.resolve().parents):
                return [
                    f"The judge is named by {quoted_path(recipe)} or was made by that run: it may have chosen what the model learnt from."
                ]
    return []


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    return [s for entry in value for s in _strings(entry)] if isinstance(value, list) else [value] if isinstance(value, str) else []
