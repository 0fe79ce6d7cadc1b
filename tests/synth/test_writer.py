"""What a pipeline gets from a model: lists that are mended once, verdicts, and branches that end alone."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gristmill.generation.api import Completion, Finish, Request
from gristmill.generation.cached import CachedClient
from gristmill.generation.endpoint import RowFailed
from gristmill.runs.journal import Journal
from gristmill.synth.templates import TemplatePack
from gristmill.synth.writer import DryRun, ParseError, Topic, Writer

Say = Callable[[str], str]


class Scripted:
    """A source that answers each prompt by a function."""

    concurrency = 8

    def __init__(self, say: Say, finish: Finish = "stop"):
        self.say, self.finish, self.asked = say, finish, [""][:0]

    def model_of(self, request_id: str) -> str:
        return "scripted"

    async def complete(self, request: Request, model: str = "") -> list[Completion]:
        self.asked.append(request.messages[-1].content)
        text = self.say(self.asked[-1])
        if text == "fail":
            raise RowFailed("no", 1, 400)
        return [Completion(text, 1, (), self.finish)] * request.sampling.n


def write(tmp_path: Path, say: Say, work: Callable[[Writer], Any], **options: Any) -> tuple[Any, Writer, Scripted]:
    source = Scripted(say, options.pop("finish", "stop"))

    async def run() -> tuple[Any, Writer]:
        with Journal(tmp_path / "j.jsonl") as journal:
            writer = Writer(CachedClient(source, journal), options.pop("templates", TemplatePack.load()), **options)
            return await work(writer), writer

    result, writer = asyncio.run(run())
    return result, writer, source


def topics(num: int) -> Callable[[Writer], Any]:
    return lambda writer: writer.items("subtopics", num, parents=["p"], topic="bees")


def test_items_are_different_and_no_more_than_asked_for(tmp_path: Path) -> None:
    found, writer, source = write(tmp_path, lambda _: "1. Honey\n2. honey!\n3. Wax\n4. Queens", topics(2))
    assert [item.text for item in found] == ["Honey", "Wax"] and len(source.asked) == 1 and not writer.dropped
    assert [item.origin for item in found] == ["scripted"] * 2
    call = found[0].id.split("#")[0]
    assert [item.id for item in found] == [f"{call}#0", f"{call}#1"]


def test_a_list_that_cannot_be_read_is_mended_once_and_nothing_is_made_up(tmp_path: Path) -> None:
    def say(prompt: str) -> str:
        return '["honey", "wax", "invented"]' if "The following should be a list" in prompt else "They make honey; and also wax."

    found, _, source = write(tmp_path, say, topics(2))
    assert [item.text for item in found] == ["honey", "wax"] and len(source.asked) == 2


def test_a_short_list_is_kept_and_counted(tmp_path: Path) -> None:
    found, writer, _ = write(tmp_path, lambda _: "- Honey\n- Wax", topics(3))
    assert len(found) == 2 and writer.dropped == {"list too short": 1}


def test_no_list_ends_the_branch(tmp_path: Path) -> None:
    with pytest.raises(ParseError, match="no list"):
        write(tmp_path, lambda _: "I would rather not.", topics(3))
    with pytest.raises(ParseError, match="cut off"):
        write(tmp_path, lambda _: "1. Honey\n2. Wa", topics(2), finish="length")


def test_a_pack_may_ask_for_one_item_at_a_time(tmp_path: Path) -> None:
    pack = tmp_path / "small.yaml"
    pack.write_text("subtopics: {text: 'Name one thing of {topic}.'}")
    names = iter(["honey", "wax", "Honey!", "queens"])
    found, _, source = write(tmp_path, lambda _: next(names), topics(4), templates=TemplatePack.load(str(pack)))
    assert {item.text.lower().strip("!") for item in found} == {"honey", "wax", "queens"} and len(source.asked) == 4


def test_yes_is_read_from_the_beginning(tmp_path: Path) -> None:
    answers = {"pi": "Yes. It is.", "rain": "No, it is not.", "art": "It depends."}

    async def ask(writer: Writer) -> list[Any]:
        out: list[Any] = []
        for entity in answers:
            try:
                out.append((await writer.yes("math_entity", entity=entity))[0])
            except ParseError as e:
                out.append(str(e))
        return out

    found, _, _ = write(tmp_path, lambda prompt: next(a for e, a in answers.items() if f'"{e}"' in prompt), ask)
    assert found == [True, False, "neither yes nor no"]


def test_a_branch_that_fails_is_counted_and_the_others_go_on(tmp_path: Path) -> None:
    def say(prompt: str) -> str:
        return "fail" if '"three"' in prompt else "I will not." if '"four"' in prompt or "The following" in prompt else "1. a\n2. b"

    async def all_of_them(writer: Writer) -> list[Topic]:
        names = ["one", "two", "three", "four", "five"]
        return await writer.all(names, lambda name: writer.items("subtopics", 2, parents=[name], topic=name))

    found, writer, _ = write(tmp_path, say, all_of_them)
    assert len(found) == 6 and writer.dropped == {"no answer": 1, "no list": 1}


def test_equal_calls_are_one_and_another_seed_or_salt_makes_another(tmp_path: Path) -> None:
    async def twice(writer: Writer) -> list[str]:
        slots: dict[str, Any] = {"num": 2, "topic": "bees"}
        return [
            (await writer.reply("subtopics", **slots)).id,
            (await writer.reply("subtopics", **slots)).id,
            (await writer.reply("subtopics", salt=1, **slots)).id,
        ]

    (first, second, third), _, source = write(tmp_path, lambda _: "1. a", twice)
    assert first == second != third and len(source.asked) == 2
    (other, *_), _, _ = write(tmp_path, lambda _: "1. a", twice, seed=1)
    assert other != first


def test_a_rehearsal_asks_nobody() -> None:
    async def run() -> DryRun:
        writer = DryRun(Scripted(lambda _: "fail"), TemplatePack.load())
        found = await writer.items("subtopics", 7, topic="bees")
        assert len(found) == 7 and (await writer.yes("math_entity", entity="pi"))[0]
        return writer

    writer = asyncio.run(run())
    assert writer.calls == {"scripted": 2} and writer.tokens_in["scripted"] > 20 and not writer.dropped


def test_what_a_model_thinks_is_no_part_of_its_reply(tmp_path: Path) -> None:
    def asked(writer: Writer) -> Any:
        return writer.reply("subtopics", num=2, topic="bees")

    reply, *_ = write(tmp_path, lambda _: "<think>\n1. Ants?\n</think>\n\n1. Honey\n2. Wax", asked)
    assert reply.text == "1. Honey\n2. Wax"
    with pytest.raises(ParseError, match="only thinking"):
        write(tmp_path, lambda _: "<think>1. Ants", asked, seed=1)
