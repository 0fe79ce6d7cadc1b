"""Benchmarks with a judge: MT-Bench, Arena-Hard, AlpacaEval 2, a judge's agreement with people, reward benchmarks.

Answers and verdicts are journalled as they arrive, in a folder: a killed run goes on, nothing is asked twice, and scores are made anew
from what was said. The folder gets results.json, samples.jsonl (a line a verdict, to be looked at) and the model's answers in the
benchmark's form.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from gristmill.core.concurrent import map_concurrent
from gristmill.core.errors import InputError
from gristmill.core.io import lock, make_folder, read_json, replacing, stamp, write_json, write_jsonl
from gristmill.core.progress import Progress
from gristmill.core.untrusted import quoted, quoted_path, read_untrusted_json
from gristmill.data.chat import Conversation, Message, to_dicts
from gristmill.data.rows import Rating, make_id
from gristmill.evaluate import alpaca_eval, arena_hard, judge_agreement, mt_bench, reward_bench
from gristmill.evaluate.model_answers import ModelAnswers, read_answers
from gristmill.evaluate.stats import accuracy
from gristmill.generation.api import Completion, SamplingParams
from gristmill.generation.api import Request as ApiRequest
from gristmill.generation.cached import CachedClient, Client
from gristmill.generation.endpoint import Endpoint, RowFailed, Target
from gristmill.generation.mixture import opened, shown
from gristmill.generation.settings import Calls
from gristmill.judge.backends import engine_client
from gristmill.judge.pairwise import (
    EXPLAINED_TEMPLATE,
    EXPLAINED_TOKENS,
    SHORT_TOKENS,
    TEMPLATE,
    Comparison,
    combine_verdicts,
    comparison_requests,
    marked_answer,
    named_answer,
)
from gristmill.judge.reward_client import RemoteRewardScorer, RewardModelEndpoint, weight_set
from gristmill.model.adapters import is_adapter, is_reward_adapter
from gristmill.runs.journal import Journal

Kind = Literal["mt-bench", "arena-hard", "alpaca-eval", "agreement", "rewards"]
KINDS: tuple[Kind, ...] = ("mt-bench", "arena-hard", "alpaca-eval", "agreement", "rewards")
OF_MODELS = ("mt-bench", "arena-hard", "alpaca-eval")  # kinds that score a model; the others score the judge itself
MARKER, RESULTS, SAMPLES = "judge.json", "results.json", "samples.jsonl"
ANSWER_CALLS, VERDICT_CALLS, RATING_CALLS = "answer-calls.jsonl", "verdict-calls.jsonl", "rating-calls.jsonl"
RATED_AT_ONCE = 64  # conversations that a reward model in process rates between two lines of the journal
WEIGHT_FILES = ("*.safetensors", "config.json", "adapter_config.json", "tokenizer*.json", "chat_template.jinja")
Item = TypeVar("Item")
Result = TypeVar("Result")
Ask = Callable[[Conversation, SamplingParams], Awaitable[Completion | None]]


@dataclass(frozen=True)
class Party:
    """A model that is asked: the base URL of an endpoint with the name it knows the model by, or a folder."""

    place: str
    model: str = ""
    key_env: str = ""

    @property
    def is_endpoint(self) -> bool:
        return self.place.startswith(("http://", "https://"))

    @property
    def name(self) -> str:
        return self.model if self.is_endpoint else Path(self.place).resolve().name

    def check(self, option: str) -> None:
        """Raise `InputError` unless it can be asked."""
        if self.is_endpoint:
            if not self.model:
                raise InputError(f"Give {option}, the name that {self.place} knows the model by.")
            Endpoint([self.target()])
        elif not (Path(self.place) / "config.json").is_file() and not is_adapter(self.place):
            others = (
                "an endpoint's base URL (http://HOST/v1), or a file of its answers"
                if option == "--endpoint-model"
                else "an endpoint's base URL"
            )
            raise InputError(f"{quoted_path(Path(self.place))} is no model folder: give one, {others}.")

    def target(self, *, logprobs: bool = False) -> Target:
        return Target(self.place, self.model, api_key_env=self.key_env, logprobs=logprobs)

    def identity(self) -> list[Any]:
        """What decides what it says: an endpoint's model by its name, a folder's by its files."""
        if self.is_endpoint:
            return [self.name]
        files = {path for pattern in WEIGHT_FILES for path in Path(self.place).glob(pattern)}
        return [self.name, {path.name: stamp(path) for path in sorted(files)}]


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
    device: str = "auto"
    chat_format: str = "auto"


def run(kind: Kind, args: JudgeArgs, progress: Progress) -> dict[str, Any]:
    """Run a judged benchmark; its results, which are in results.json too.

    Raises:
        InputError: a file is wrong, a model cannot be asked, or no reply of the judge can be read.
    """
    _check(kind, args)
    work = {"mt-bench": _mt_bench, "arena-hard": _arena_hard, "alpaca-eval": _alpaca_eval, "agreement": _agreement, "rewards": _rewards}[
        kind
    ]
    session = _Session(kind, args, progress)
    prepared = work(session)
    with session.folder():
        results, samples = prepared()
        notes = [*results.pop("notes", []), *session.notes()]
        results = {"benchmark": kind, **session.head(), **results, "failed_calls": session.failed, "notes": notes}
        with replacing(args.out / SAMPLES) as path:
            write_jsonl(path, samples)
        write_json(args.out / RESULTS, results)
    if session.num_replies and session.unreadable == session.num_replies:
        raise InputError(
            f"The judge {quoted(results['judge'])} gave no readable verdict in any of {session.num_replies} replies (the first begins "
            f"{quoted(session.first_unreadable)}): look at {quoted_path(args.out / SAMPLES)}, and take a judge that keeps to the form."
        )
    return results


def _check(kind: Kind, args: JudgeArgs) -> None:
    if kind not in KINDS:
        raise InputError(f"There is no judged benchmark {kind!r}: choose one of {', '.join(KINDS)}.")
    if kind in OF_MODELS and (args.model is None) == (args.answers is None):
        raise InputError(f"{kind} judges a model: give its folder, the base URL of its endpoint, or a file of its answers.")
    if kind not in OF_MODELS and (args.model is not None or args.answers is not None):
        raise InputError(f"{kind} measures the judge itself: give it with --judge alone.")
    of_pairs = ("agreement", "rewards")
    given = {
        "--baseline": (args.baseline, ("mt-bench", "arena-hard")),
        "--references": (args.references, ("mt-bench",)),
        "--greedy": (args.greedy or None, ("mt-bench",)),
        "--explain": (args.explain or None, of_pairs),
        "--reward or --llm": (args.is_reward, of_pairs),
    }
    for name, (option, kinds) in given.items():
        if option is not None and kind not in kinds:
            raise InputError(f"{kind} does not take {name}, which is for {' and '.join(kinds)}: leave it out.")
    for name, value in (("--limit", args.limit), ("--max-tokens", args.max_tokens), ("--judge-tokens", args.judge_tokens)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}.")
    weight_set(args.weights)
    if args.model is not None:
        args.model.check("--endpoint-model")
    if args.judge is not None:
        args.judge.check("--judge-model")
        if kind in OF_MODELS and is_reward_model(args.judge):
            raise InputError(f"{quoted(args.judge.place)} holds a reward model, which writes no verdicts: give a judge that writes.")


class _Session:
    """One run: who is asked, the folder, and what is counted on the way."""

    def __init__(self, kind: Kind, args: JudgeArgs, progress: Progress):
        self.kind, self.args, self.progress = kind, args, progress
        self.failed = self.num_replies = self.unreadable = self.num_cut = 0
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
        identity = party.identity()
        if party.is_endpoint:
            client: Client = Endpoint([party.target(logprobs=logprobs)], **Calls(concurrency=args.concurrency).model_dump())
        else:
            client, _ = engine_client(Path(party.place), args.chat_format, args.device)
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
        if model is None or judge is None:
            return out
        if model.identity() == judge.identity():
            return [*out, "The judge is the model itself: judges favour their own answers."]
        return out + _has_filtered(model, judge)


def _has_filtered(model: Party, judge: Party) -> list[str]:
    """A sentence where the recipe of the run that a model folder lies in names the judge."""
    for folder in Path(model.place).resolve().parents[:2] if not model.is_endpoint else ():
        recipe = folder / "recipe.yaml"
        if recipe.is_file():
            try:
                text = yaml.safe_load(recipe.read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):
                continue
            known = {judge.model} if judge.is_endpoint else {judge.place, str(Path(judge.place).resolve())}
            if known & set(_strings(text)) or (not judge.is_endpoint and folder in Path(judge.place).resolve().parents):
                return [
                    f"The judge is named by {quoted_path(recipe)} or was made by that run: it may have chosen what the model learnt from."
                ]
    return []


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    return [s for entry in value for s in _strings(entry)] if isinstance(value, list) else [value] if isinstance(value, str) else []


Prepared = Callable[[], tuple[dict[str, Any], list[dict[str, Any]]]]  # what is left to do when all files have been read


# ---- MT-Bench ----


def _mt_bench(session: _Session) -> Prepared:
    args = session.args
    everything, said = mt_bench.read_questions(args.data, args.references)
    questions = session.limited(everything, lambda q: q.category)
    given, judge = session.answers_of(), session.judge
    if given is not None:
        for q in questions:
            given.of(q.id, f"question {q.id}", mt_bench.NUM_TURNS)
    baseline = read_answers(args.baseline) if args.baseline is not None else None
    if baseline is not None:
        for q in questions:
            baseline.of(q.id, f"question {q.id}", mt_bench.NUM_TURNS)

    async def answer(ask: Ask, q: mt_bench.Question) -> list[Completion | None]:
        sampling = mt_bench.answer_sampling(q, greedy=args.greedy, max_tokens=args.max_tokens or mt_bench.MAX_TOKENS)
        talk: list[Message] = []
        out: list[Completion | None] = []
        for turn in q.turns:
            talk.append(Message("user", turn))
            found = await ask(tuple(talk), sampling) if None not in out else None
            out.append(found)
            talk.append(Message("assistant", found.text if found else ""))
        return out

    async def grade(ask: Ask, case: tuple[mt_bench.Question, int, Sequence[str]]) -> Completion | None:
        q, turn, answers = case
        return await ask(mt_bench.grading_prompt(q, answers, turn), session.judging(mt_bench.JUDGE_TOKENS))

    async def compare(ask: Ask, case: tuple[mt_bench.Question, int, Sequence[str], Sequence[str]]) -> list[Completion | None]:
        q, turn, *sides = case
        orders = (sides[0], sides[1]), (sides[1], sides[0])
        return [await ask(mt_bench.comparing_prompt(q, a, b, turn), session.judging(mt_bench.JUDGE_TOKENS)) for a, b in orders]

    def work() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        answers: dict[str, tuple[str, ...]] = {}
        if given is not None:
            answers = {q.id: given.of(q.id, f"question {q.id}", mt_bench.NUM_TURNS) for q in questions}
        else:
            assert args.model is not None
            asked = session.answer(args.model, questions, answer, calls=ANSWER_CALLS, what="answers")
            answers = {q.id: tuple(c.text for c in found if c is not None) for q, found in zip(questions, asked, strict=True)}
            rows = [_mt_bench_row(q.id, session.model_name, answers[q.id]) for q in questions if len(answers[q.id]) == mt_bench.NUM_TURNS]
            _write_answers(args.out, rows)
        cases = [(q, turn, answers[q.id]) for q in questions for turn in range(mt_bench.NUM_TURNS) if len(answers[q.id]) > turn]
        replies = session.answer(judge, cases, grade, calls=VERDICT_CALLS, what="verdicts")
        samples = []
        for (q, turn, said_by_model), reply in zip(cases, replies, strict=True):
            score = session.read(mt_bench.parse_rating(reply.text) if reply else None, reply)
            fastchat = mt_bench.parse_rating_as_fastchat(reply.text) if reply else None
            head = {"id": q.id, "category": q.category, "turn": turn + 1, "question": q.turns[turn], "answer": said_by_model[turn]}
            samples.append({**head, "reply": reply.text if reply else None, "score": score, "fastchat_score": fastchat})
        results = {
            "scores": mt_bench.grade_scores(samples, seed=args.seed),
            "references": said,
            "verdicts": session.counts,
        }
        if baseline is not None:
            pairs = [(*case, baseline.of(case[0].id, f"question {case[0].id}", mt_bench.NUM_TURNS)) for case in cases]
            rows, places = [], list[bool]()
            for (q, turn, *_), found in zip(pairs, session.answer(judge, pairs, compare, calls=VERDICT_CALLS, what="pairs"), strict=True):
                texts = [_marked(session, reply) for reply in found]
                verdict = combine_verdicts(*texts)
                said_by_judge = [reply.text if reply else None for reply in found]
                places += [text == "[[A]]" for text in texts if text in ("[[A]]", "[[B]]")]
                rows.append({"id": q.id, "category": q.category, "turn": turn + 1, "replies": said_by_judge, "verdict": verdict})
            scores = mt_bench.pair_scores(rows, seed=args.seed)
            results["pairs"] = {**scores, "baseline": baseline.model, "first_place": accuracy(places), "verdicts": session.counts}
            samples += rows
        return {**results, "notes": mt_bench.notes(questions, said)}, samples

    return work


def _mt_bench_row(name: str, model: str, answers: Sequence[str]) -> dict[str, Any]:
    return {"question_id": name, "answer_id": make_id(name, model), "model_id": model, "choices": [{"index": 0, "turns": list(answers)}]}


def _marked(session: _Session, reply: Completion | None) -> str:
    """A reply cut down to its marked verdict, and counted."""
    name = session.read(marked_answer(reply.text) if reply else "", reply)
    return f"[[{name}]]" if name else ""


def _write_answers(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    with replacing(out / "answers.jsonl") as path:
        write_jsonl(path, rows)


# ---- one turn: Arena-Hard and AlpacaEval ----


def _single_answers(session: _Session, prompts: Mapping[str, str], max_tokens: int) -> dict[str, str]:
    """The model's greedy answers to prompts by name, without those that failed."""
    sampling = SamplingParams(temperature=0.0, max_tokens=session.args.max_tokens or max_tokens)

    async def answer(ask: Ask, prompt: str) -> Completion | None:
        return await ask((Message("user", prompt),), sampling)

    assert session.args.model is not None
    found = session.answer(session.args.model, list(prompts.values()), answer, calls=ANSWER_CALLS, what="answers")
    return {name: c.text for name, c in zip(prompts, found, strict=True) if c is not None}


def _arena_hard(session: _Session) -> Prepared:
    args = session.args
    questions = session.limited(arena_hard.read_questions(args.data), lambda q: q.category)
    baselines = arena_hard.read_baselines(args.data, questions, args.baseline)
    bases = {q.id: baselines[q.category].of(q.id, f"question {q.id}")[0] for q in questions}
    given, judge = session.answers_of(), session.judge
    known = {q.id: given.of(q.id, f"question {q.id}")[0] for q in questions} if given is not None else None
    tokens = arena_hard.JUDGE_TOKENS[all(q.is_v01 for q in questions)]

    async def play(ask: Ask, case: tuple[arena_hard.Question, str]) -> list[Completion | None]:
        q, answer = case
        games = (bases[q.id], answer), (answer, bases[q.id])
        return [await ask(arena_hard.judging_prompt(q, a, b), session.judging(tokens)) for a, b in games]

    def work() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        answers = known
        if answers is None:
            answers = _single_answers(session, {q.id: q.prompt for q in questions}, arena_hard.MAX_TOKENS)
            rows = [_arena_row(q, session.model_name, answers[q.id]) for q in questions if q.id in answers]
            _write_answers(args.out, rows)
        cases = [(q, answers[q.id]) for q in questions if q.id in answers]
        samples, battles = [], []
        for (q, answer), games in zip(cases, session.answer(judge, cases, play, calls=VERDICT_CALLS, what="verdicts"), strict=True):
            verdicts = [session.read(arena_hard.parse_verdict(game.text) if game else None, game) for game in games]
            scores = arena_hard.battle_scores(verdicts[0], verdicts[1])
            base = baselines[q.category]
            counted = given.tokens.get(q.id) if given is not None and q.id in base.tokens else None  # by one counter or by the other
            style = arena_hard.style_of(answer, counted)
            base_style = arena_hard.style_of(bases[q.id], base.tokens[q.id] if counted is not None else None)
            battles.append((q.category, arena_hard.Battle(q.id, session.model_name, base.model, scores, style, base_style)))
            said = [game.text if game else None for game in games]
            head = {"id": q.id, "category": q.category, "question": q.prompt, "answer": answer, "baseline": bases[q.id]}
            samples.append({**head, "replies": said, "verdicts": verdicts, "scores": list(scores)})
        results: dict[str, Any] = {"scores": {}, "baselines": {c: found.model for c, found in baselines.items()}}
        for category in dict.fromkeys(category for category, _ in battles):
            mine = [battle for c, battle in battles if c == category]
            played = [b for b in mine if b.scores]
            controlled = arena_hard.leaderboard(played, seed=args.seed)[session.model_name] if played else None
            score = {**arena_hard.win_rate(played, seed=args.seed), "style_controlled": controlled, "dropped": len(mine) - len(played)}
            results["scores"][category] = score
        places = arena_hard.first_place([verdict for sample in samples for verdict in sample["verdicts"]])
        results |= {"first_place": places, "verdicts": session.counts, "ridge": arena_hard.RIDGE}
        return {**results, "notes": arena_hard.notes(questions, baselines, [b for _, b in battles])}, samples

    return work


def _arena_row(q: arena_hard.Question, model: str, answer: str) -> dict[str, Any]:
    talk = [{"role": "user", "content": q.prompt}, {"role": "assistant", "content": {"answer": answer}}]
    return {"uid": q.id, "ans_id": make_id(q.id, model), "model": model, "messages": talk}


def _alpaca_eval(session: _Session) -> Prepared:
    args = session.args
    annotations = alpaca_eval.read_annotations(args.answers) if args.answers is not None else None
    folder = args.data if args.data.is_dir() else args.data.parent
    if annotations is not None:
        rows = session.limited(annotations)
        session.model_name = str(rows[0]["generator_2"])
        difficulty = alpaca_eval.read_difficulty(folder, len(rows))

        def scored() -> tuple[dict[str, Any], list[dict[str, Any]]]:
            lengths = [(len(row["output_1"]), len(row["output_2"])) for row in rows]
            scores = alpaca_eval.win_rates([row["preference"] for row in rows], lengths, difficulty, seed=args.seed)
            name = scores["length_controlled"]["name"]
            said = alpaca_eval.notes(len(rows), [row["generator_1"] for row in rows], name)
            unreadable = sum(row["preference"] is None for row in rows)
            return {"scores": scores, "verdicts": {"replies": len(rows), "unreadable": unreadable}, "notes": said}, []

        return scored
    instructions = session.limited(alpaca_eval.read_instructions(args.data))
    difficulty = alpaca_eval.read_difficulty(folder, len(instructions))
    given, judge = session.answers_of(), session.judge
    known = {i.text: given.of(i.text, quoted(i.text))[0] for i in instructions} if given is not None else None

    async def prefer(ask: Ask, case: tuple[alpaca_eval.Instruction, str]) -> Completion | None:
        instruction, output = case
        first = alpaca_eval.model_is_first(instruction.text, args.seed)
        return await ask(alpaca_eval.judging_prompt(instruction, output, first=first), session.judging(alpaca_eval.JUDGE_TOKENS))

    def work() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        outputs = known
        if outputs is None:
            outputs = _single_answers(session, {i.text: i.text for i in instructions}, alpaca_eval.MAX_TOKENS)
            rows = [
                {"instruction": i.text, "output": outputs[i.text], "generator": session.model_name}
                for i in instructions
                if i.text in outputs
            ]
            _write_answers(args.out, rows)
        answered = [i for i in instructions if i.text in outputs]
        cases = [(i, outputs[i.text]) for i in answered]
        found = session.answer(judge, cases, prefer, calls=VERDICT_CALLS, what="verdicts", logprobs=True)
        preferences: dict[str, float | None] = {}
        samples, hard = [], 0
        for (i, output), reply in zip(cases, found, strict=True):
            logprob = reply.logprobs[0] if reply is not None and len(reply.logprobs) == 1 and reply.num_tokens == 1 else None
            first = alpaca_eval.model_is_first(i.text, args.seed)
            preferences[i.text] = session.read(alpaca_eval.parse_preference(reply.text, logprob, first=first) if reply else None, reply)
            hard += preferences[i.text] is not None and logprob is None
            head = {"instruction": i.text, "output_1": i.baseline_output, "generator_1": i.baseline, "output_2": output}
            said = {"generator_2": session.model_name, "model_is": "m" if first else "M", "reply": reply.text if reply else None}
            samples.append({**head, **said, "preference": preferences[i.text]})
        lengths = [(len(i.baseline_output), len(outputs.get(i.text, ""))) for i in instructions]
        scores = alpaca_eval.win_rates([preferences.get(i.text) for i in instructions], lengths, difficulty, seed=args.seed)
        notes = alpaca_eval.notes(len(instructions), [i.baseline for i in instructions], scores["length_controlled"]["name"], hard=hard)
        return {"scores": scores, "verdicts": session.counts, "notes": notes}, samples

    return work


# ---- the judge itself: agreement with people, reward benchmarks ----


def is_reward_model(judge: Party) -> bool:
    """Whether a folder holds a reward model."""
    folder = Path(judge.place)
    if judge.is_endpoint:
        return False
    if is_adapter(folder):
        return is_reward_adapter(folder)
    return "reward_weights" in read_untrusted_json(folder / "config.json")


def _replies(session: _Session, comparisons: Sequence[Comparison]) -> dict[str, tuple[str, str]]:
    """The judge's replies to both orders of each comparison, cut down to their verdicts; "" where there is none to read."""
    explain = session.args.explain
    template, tokens = (EXPLAINED_TEMPLATE, EXPLAINED_TOKENS) if explain else (TEMPLATE, SHORT_TOKENS)

    async def compare(ask: Ask, c: Comparison) -> list[Completion | None]:
        requests = comparison_requests([c], template, session.args.judge_tokens or tokens)
        return [await ask(request.messages, request.sampling) for request in requests]

    found = session.answer(session.judge, comparisons, compare, calls=VERDICT_CALLS, what="verdicts")
    out = {}
    for c, replies in zip(comparisons, found, strict=True):
        names = []
        for reply in replies:
            name = "" if reply is None else marked_answer(reply.text) if explain else named_answer(reply.text)
            names.append(f"[[{name}]]" if session.read(name, reply) else "")
        out[c.id] = (names[0], names[1])
    return out


def _rewards_of(session: _Session, talks: Mapping[str, Conversation]) -> dict[str, float]:
    """Rewards of conversations by name, from the reward model in process or behind an endpoint; none of what cannot be rated."""
    args, judge = session.args, session.judge
    identity = judge.identity()
    if judge.is_endpoint:
        return _endpoint_rewards(session, talks, identity)
    from gristmill.judge.reward import load_scorer

    scorer = load_scorer(Path(judge.place), args.chat_format, device=args.device)
    ids = {name: make_id("rating", identity, to_dicts(talk)) for name, talk in talks.items()}
    ratings: dict[str, Rating] = {}
    with Journal(args.out / RATING_CALLS) as journal, session.progress.stage("ratings"):
        fitting = [name for name, talk in talks.items() if ids[name] in journal or scorer.fits(talk)]
        todo = [name for name in fitting if ids[name] not in journal]
        for start in range(0, len(todo), RATED_AT_ONCE):
            part = todo[start : start + RATED_AT_ONCE]
            for name, rating in zip(part, scorer.score([talks[name] for name in part]), strict=True):
                journal.append({"id": ids[name], "rating": asdict(rating)})
            session.progress.tick(start + len(part), len(todo), "answers rated")
        ratings = {name: Rating(**journal[ids[name]]["rating"]) for name in fitting}
    return {name: scorer.total(rating) for name, rating in ratings.items()}


def _endpoint_rewards(session: _Session, talks: Mapping[str, Conversation], identity: Any) -> dict[str, float]:
    args = session.args

    async def all_of_them() -> dict[str, float]:
        source = RewardModelEndpoint([session.judge.target()], **Calls(concurrency=args.concurrency).model_dump())
        with Journal(args.out / RATING_CALLS) as journal:
            client = CachedClient(source, journal, retry_failed=args.retry_failed)
            scorer = RemoteRewardScorer(client, args.weights)

            async def one(name: str) -> tuple[str, float | None]:
                try:
                    return name, scorer.total(await scorer.rate(talks[name], make_id("rating", identity, to_dicts(talks[name]))))
                except RowFailed:
                    return name, None

            async with opened(source), shown(client, session.progress.tick, len(talks)):
                found = [pair async for pair in map_concurrent(list(talks), one, min(2 * source.concurrency, max(1, len(talks))))]
            session.failed += client.failed
            return {name: reward for name, reward in found if reward is not None}

    with session.progress.stage("ratings"):
        return asyncio.run(all_of_them())


def _agreement(session: _Session) -> Prepared:
    args, judge = session.args, session.judge
    pairs = session.limited(judge_agreement.read_labelled_pairs(args.data), lambda p: p.subset)
    is_reward = is_reward_model(judge) if args.is_reward is None else args.is_reward

    def work() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        if is_reward:
            sides = {(p.id, i): (*p.messages, Message("assistant", text)) for p in pairs for i, text in enumerate((p.first, p.second))}
            rewards = _rewards_of(session, {f"{name}#{i}": talk for (name, i), talk in sides.items()})
            replies = {p.id: _as_replies(rewards.get(f"{p.id}#0"), rewards.get(f"{p.id}#1")) for p in pairs}
        else:
            replies = _replies(session, [p.comparison for p in pairs])
        scores = judge_agreement.agreement(pairs, replies, seed=args.seed)
        samples = [
            {
                "id": p.id,
                "subset": p.subset,
                "messages": to_dicts(p.messages),
                "first": p.first,
                "second": p.second,
                "label": p.label,
                "replies": list(replies[p.id]),
                "verdict": combine_verdicts(*replies[p.id]),
            }
            for p in pairs
        ]
        return {"judge_kind": "reward model" if is_reward else "LLM judge", "scores": scores, "verdicts": session.counts}, samples

    return work


def _as_replies(first: float | None, second: float | None) -> tuple[str, str]:
    """The verdicts of both orders that two rewards stand for."""
    if first is None or second is None:
        return "", ""
    return ("[[C]]", "[[C]]") if first == second else ("[[A]]", "[[B]]") if first > second else ("[[B]]", "[[A]]")


def _rewards(session: _Session) -> Prepared:
    args, judge = session.args, session.judge
    items = session.limited(reward_bench.read_benchmarks(args.data), lambda i: f"{i.benchmark}/{i.subset}")
    is_reward = is_reward_model(judge) if args.is_reward is None else args.is_reward

    def work() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        outcomes: dict[str, list[list[float]]] = {}
        samples: list[dict[str, Any]] = []
        unrated = 0
        if is_reward:
            talks = {
                f"{item.id}#{side}{i}": (*item.messages, Message("assistant", text))
                for item in items
                for side, texts in (("c", item.chosen), ("r", item.rejected))
                for i, text in enumerate(texts)
            }
            rewards = _rewards_of(session, talks)
            unrated = len(talks) - len(rewards)
            for item in items:
                better = [rewards.get(f"{item.id}#c{i}") for i in range(len(item.chosen))]
                worse = [rewards.get(f"{item.id}#r{i}") for i in range(len(item.rejected))]
                outcomes[item.id] = [[reward_bench.outcome_of_rewards(b, w) for w in worse] for b in better]
                samples.append(_reward_sample(item, outcomes[item.id]) | {"chosen_rewards": better, "rejected_rewards": worse})
        else:
            cases = {
                (item.id, i, j): (item, b, w) for item in items for i, b in enumerate(item.chosen) for j, w in enumerate(item.rejected)
            }
            comparisons = {key: Comparison(f"{key[0]}#{key[1]}#{key[2]}", item.messages, b, w) for key, (item, b, w) in cases.items()}
            replies = _replies(session, list(comparisons.values()))
            for item in items:
                said = [[replies[comparisons[item.id, i, j].id] for j in range(len(item.rejected))] for i in range(len(item.chosen))]
                outcomes[item.id] = [[reward_bench.outcome_of_replies(*pair) for pair in row] for row in said]
                samples.append(_reward_sample(item, outcomes[item.id]) | {"replies": [[list(pair) for pair in row] for row in said]})
        scores = reward_bench.benchmark_scores(items, outcomes, seed=args.seed)
        notes = [f"{name}: {note}" for name, found in scores.items() for note in found.pop("notes")]
        notes += (
            [f"{unrated} answers have no reward (too long for the model, or the call failed): their pairs are lost."] if unrated else []
        )
        kind = "reward model" if is_reward else "LLM judge"
        return {"judge_kind": kind, "scores": scores, "verdicts": session.counts, "unrated": unrated, "notes": notes}, samples

    return work


def _reward_sample(item: reward_bench.RewardItem, outcome: Sequence[Sequence[float]]) -> dict[str, Any]:
    head = {"id": item.id, "benchmark": item.benchmark, "subset": item.subset, "messages": to_dicts(item.messages)}
    return {**head, "chosen": list(item.chosen), "rejected": list(item.rejected), "outcome": [list(row) for row in outcome]}


# ---- the table ----


def table(results: Mapping[str, Any]) -> list[str]:
    """The results as lines of a table, notes last."""
    lines: list[str] = []

    def add(name: str, score: Mapping[str, Any], digits: int, more: str = "") -> None:
        name = " ".join(name.split())  # it may be a file's
        if score.get("mean") is None or score.get("n") == 0:
            lines.append(f"{name:<34} none{more}")
            return
        low, high = score.get("ci95") or (None, None)
        interval = f" [{low:.{digits}f}, {high:.{digits}f}]" if low is not None else ""
        num = f"  n {score['n']:,}" if "n" in score else ""
        lines.append(f"{name:<34} {score['mean']:.{digits}f}{interval}{num}{more}")

    scores = results["scores"]
    match results["benchmark"]:
        case "mt-bench":
            add("MT-Bench", scores["overall"], 2)
            for turn in scores["turns"]:
                add(f"turn {turn}", scores["turns"][turn], 2)
            for category, score in scores["categories"].items():
                add(category, score, 2)
            add("as FastChat reads the replies", scores["fastchat"], 2, f"  {scores['fastchat']['read_otherwise']} read otherwise")
            if pairs := results.get("pairs"):
                for name, score in {"overall": pairs["overall"], **{f"turn {t}": s for t, s in pairs["turns"].items()}}.items():
                    counts = f"  wins {score['wins']}, ties {score['ties']}, losses {score['losses']}"
                    add(f"against {pairs['baseline']}, {name}", score, 3, counts)
                add("first place", pairs["first_place"], 3)
        case "arena-hard":
            for category, score in scores.items():
                add(category, score, 1, f"  dropped {score['dropped']}")
                if score["style_controlled"]:
                    add(f"{category}, style controlled", score["style_controlled"], 1)
            add("first place", results["first_place"], 3)
        case "alpaca-eval":
            add("win rate", scores["win_rate"], 2)
            add(scores["length_controlled"]["name"], scores["length_controlled"], 2)
        case "agreement":
            for name in ("agreement", "decided", "single_order", "consistent", "first_place", "kappa"):
                add(name.replace("_", " "), scores[name], 3)
            for name in ("judge", "people", "difference"):
                add(f"longer answer, {name}", scores["length"][name], 3)
            for name, score in scores["subsets"].items():
                add(name, score, 3)
            if people := scores.get("people"):
                kappas = "  ".join("none" if k is None else f"{k:.3f}" for k in people["kappas"])
                lines.append(f"{'people among themselves':<34} alpha {people['alpha']}  kappas {kappas}")
        case "rewards":
            for name, found in scores.items():
                overall = found["overall"]
                add(name, overall if isinstance(overall, Mapping) else {"mean": overall}, 4)
                named = ("with_priors", "as_leaderboard", "hard", "normal", "easy")
                rows = {part: {"mean": found[part]} for part in named if found.get(part) is not None}
                rows |= {c: {"mean": mean} for c, mean in found.get("categories", {}).items()}
                rows |= {**found.get("domains", {}), **found.get("subsets", {})}
                for part, score in rows.items():
                    add(f"  {part}", score, 4)
    counts = results["verdicts"]
    lines.append(f"unreadable verdicts: {counts['unreadable']} of {counts['replies']} replies; failed calls: {results['failed_calls']}")
    return lines + [f"note: {note}" for note in results["notes"]]
