"""Benchmarks of a model, scored by a judge: MT-Bench, Arena-Hard, AlpacaEval 2."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gristmill.core.io import replacing, write_jsonl
from gristmill.core.untrusted import quoted
from gristmill.data.chat import Message
from gristmill.data.rows import make_id
from gristmill.evaluate import alpaca_eval, arena_hard, mt_bench
from gristmill.evaluate.model_answers import read_answers
from gristmill.evaluate.stats import accuracy
from gristmill.generation.api import Completion, SamplingParams
from gristmill.judge.pairwise import (
    combine_verdicts,
    marked_answer,
)
from gristmill.workflows.judged.session import ANSWER_CALLS, VERDICT_CALLS, Ask, JudgedSession, Prepared

# ---- MT-Bench ----


def run_mt_bench(session: JudgedSession) -> Prepared:
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


def _marked(session: JudgedSession, reply: Completion | None) -> str:
    """A reply cut down to its marked verdict, and counted."""
    name = session.read(marked_answer(reply.text) if reply else "", reply)
    return f"[[{name}]]" if name else ""


def _write_answers(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    with replacing(out / "answers.jsonl") as path:
        write_jsonl(path, rows)


# ---- one turn: Arena-Hard and AlpacaEval ----


def _single_answers(session: JudgedSession, prompts: Mapping[str, str], max_tokens: int) -> dict[str, str]:
    """The model's greedy answers to prompts by name, without those that failed."""
    sampling = SamplingParams(temperature=0.0, max_tokens=session.args.max_tokens or max_tokens)

    async def answer(ask: Ask, prompt: str) -> Completion | None:
        return await ask((Message("user", prompt),), sampling)

    assert session.args.model is not None
    found = session.answer(session.args.model, list(prompts.values()), answer, calls=ANSWER_CALLS, what="answers")
    return {name: c.text for name, c in zip(prompts, found, strict=True) if c is not None}


def run_arena_hard(session: JudgedSession) -> Prepared:
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


def run_alpaca_eval(session: JudgedSession) -> Prepared:
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
