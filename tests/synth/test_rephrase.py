"""Segments of documents, and what is made of a model's answers about them."""

import random
from collections.abc import Sequence

import pytest

from gristmill.synth.rephrase import (
    TASKS,
    TaskName,
    max_segment_tokens,
    messages,
    parse_answer,
    split_segments,
    strip_markdown,
    template_name,
)
from gristmill.synth.templates import TemplatePack
from gristmill.synth.writer import ParseError


def words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def made(name: TaskName, answer: str, segment: str = "A segment. " * 40, tokens: int = 100, seed: int = 0) -> str:
    return parse_answer(
        name, answer, tokens, max_tokens=600, segment=(segment, len(segment.split())), draw=random.Random(seed), count=words
    )[1]


def test_every_task_has_its_templates() -> None:
    templates = TemplatePack.load()
    for name, task in TASKS.items():
        system, user = messages(name, "<the {document}>", templates)
        assert (system.role, user.role) == ("system", "user") and "<the {document}>" in user.content and task.opening in user.content
        assert templates[template_name(name)].sampling.temperature == 0.5 and max_segment_tokens(name, templates, words) > task.min_segment


def test_neighbouring_lines_are_joined_while_there_is_room() -> None:
    lines = [" ".join(f"w{line}-{i}" for i in range(20)) for line in range(10)]
    found = split_segments("distill", "\n".join(lines), 63, count=words)
    assert [text.split("\n") for text, _ in found] == [lines[0:3], lines[3:6], lines[6:9], lines[9:]]
    assert [size for _, size in found] == [62, 62, 62, 20]
    assert split_segments("distill", "\n".join(lines), 62, count=words)[0][0] == "\n".join(lines[:3])
    assert split_segments("distill", "\n".join(lines), 61, count=words)[0][0] == "\n".join(lines[:2])


def test_long_lines_are_cut_between_sentences_and_too_long_sentences_left_out() -> None:
    short, long = "Nine words stand in this sentence of the text.", "word " * 50 + "end."
    (first, second) = split_segments("distill", f"{short} {short} {long} {short} {short}", 30, count=words)
    assert first == second == (f"{short} {short}", 19)  # not joined over what was left out
    assert split_segments("distill", long, 30, count=words) == []


def test_sentences_are_joined_as_they_were() -> None:
    text = "\u8fd9\u662f\u4e00\u3002" * 40
    assert "".join(part for part, _ in split_segments("distill", text, 60, count=lambda texts: [len(t) for t in texts])) == text


def test_short_documents_and_segments_are_left_out() -> None:
    assert (
        split_segments("diverse_qa", "word " * 29, 900, count=words) == []
        and len(split_segments("diverse_qa", "word " * 30, 900, count=words)) == 1
    )
    assert split_segments("wikipedia", "", 400, count=words) == []
    assert [size for _, size in split_segments("diverse_qa", "word " * 35 + "\n" + "word " * 20, 40, count=words)] == [35]


@pytest.mark.parametrize("name", ["wikipedia", "distill"])
def test_the_opening_is_asked_for_and_cut_off(name: TaskName) -> None:
    opening, text = TASKS[name].opening, "It is said again. " * 20
    assert made(name, f"**{opening}**\n\n\u201c{text.strip()}\u201d") == text.strip()
    assert made(name, f"{opening.lower()} {text}") == text.strip()
    with pytest.raises(ParseError, match="no opening"):
        made(name, text)


def test_answers_that_were_cut_or_are_too_short() -> None:
    text = TASKS["wikipedia"].opening + " word" * 60
    assert made("wikipedia", text, tokens=598)
    for tokens, answer, why in ((599, text, "too many"), (60, "x" * 32 * 601, "too many"), (60, text[:100], "too few")):
        with pytest.raises(ParseError, match=why):
            made("wikipedia", answer, tokens=tokens)


def test_passages_and_lists_lose_their_marks() -> None:
    body = "A fact stands here. " * 15
    assert made("extract_knowledge", f"Passage:\n{body}\nPassage 2:\n{body}").split("\n") == [body, body.strip()]
    entries = [f"fact number {i} is about the thing with the number {i}" for i in range(10)]
    assert made("knowledge_list", "Here it is:\n" + "\n".join(f"* {e}" for e in entries)).split("\n") == entries
    assert made("knowledge_list", "\n".join(f"- {e}" for e in entries)).split("\n") == entries


@pytest.mark.parametrize(("tokens", "most"), [(150, 10), (15, 1), (600, 40), (5, 1)])
def test_as_many_pairs_as_the_segment_allows(tokens: int, most: int) -> None:
    pairs = [f"Question: What is {i}? Answer: It is {i}." for i in range(50)]
    answer = "Here are the questions and answers:\n" + "\n".join(f"- {pair}" for pair in pairs)
    counts = set()
    for seed in range(400):
        whole, written = parse_answer(
            "diverse_qa", answer, 500, max_tokens=600, segment=("word " * 100, tokens), draw=random.Random(seed), count=words
        )
        kept = written.split("\n\n")
        assert set(kept) <= set(pairs) and whole == "word " * 100 + "\n\n" + written
        counts.add(len(kept))
    assert min(counts) == 1 and max(counts) == most


def test_pairs_over_several_lines_and_text_that_is_no_pair() -> None:
    answer = "Announcement\n- Question: Which?\n(a) one (b) two\nAnswer: one\n\n- Question: Is it? Answer: Yes."
    kept = {pair for seed in range(20) for pair in made("diverse_qa", answer, "word " * 100, seed=seed).split("\n\n")}
    assert kept == {"Question: Which?\n(a) one (b) two\nAnswer: one", "Question: Is it? Answer: Yes."}
    wrong = {"Well\nso\n- Question: a? Answer: b": "before", "Sorry.": "no question", "- Question: only?": "without an answer"}
    for answer, why in wrong.items():
        with pytest.raises(ParseError, match=why):
            made("diverse_qa", answer, "word " * 100)


def test_markdown_becomes_plain_text() -> None:
    text = "# Head\n\n**bold** and *thin* and __both__ and `code`, "
    text += "[a link](http://x.org/y) ![](pic.png)\n---\n```py\nx = 2 * 3 * 4\n```\n* 1\n+ 2"
    assert " ".join(strip_markdown(text).split()) == "Head bold and thin and both and code, a link x = 2 * 3 * 4 - 1 - 2"
    for code in ("`__init__`", "`**kwargs`", "`a*b*c`"):
        assert strip_markdown(f"Call {code} here.") == f"Call {code[1:-1]} here."
    assert strip_markdown("```py\n# count\n* c\n```\n# Head") == "# count\n* c\nHead"
    for plain in (
        "a**b + c**d",
        "2**3 + 4**5",
        "handlers[name](event)",
        "snake_case_name and 2*3*4",
        "a * b * c",
        "5 - 3 - 1",
        "x_1 + x_2",
    ):
        assert strip_markdown(plain) == plain
    strip_markdown("**" * 50_000 + "[" * 50_000 + "_" * 50_000 + "`" * 50_001)  # in no time
    strip_markdown("**a " * 20_000 + " **a" * 20_000)
