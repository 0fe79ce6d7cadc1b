"""Templates are data that is checked when it is read."""

from pathlib import Path

import pytest

from gristmill.core.errors import InputError
from gristmill.miniature.world import NEXT_REQUEST, PROMPT_REQUEST, TOPIC_REQUEST
from gristmill.synth.templates import TemplatePack


def test_the_default_pack_renders() -> None:
    pack = TemplatePack.load()
    for template in pack.values():
        text = template.render(**{slot: f"<{slot} {{braces}}>" for slot in template.slots})
        used = set(template.slots) - ({"question", "answer"} if "history" in template.slots else set())  # for packs that want these
        assert all(f"<{slot} {{braces}}>" in text for slot in used)
    with pytest.raises(InputError, match="Template subtopics has the slots num, topic; wrong or missing: topic"):
        pack["subtopics"].render(num=3)


def test_the_miniatures_pack_asks_in_the_words_that_it_has_learnt() -> None:
    pack = TemplatePack.load("miniature")
    assert [pack[name].text for name in ("macro_topics", "math_topics", "python_topics")] == list(TOPIC_REQUEST.values())
    assert pack["next_turn"].text == NEXT_REQUEST
    learnt = {request.format(topic="<topic>") for request in PROMPT_REQUEST.values()}
    for name in ("questions", "writing_tasks", "math_problems", "python_problems_advanced"):
        slots = dict.fromkeys(pack[name].slots, 1) | {"topic": "<topic>"}
        assert pack[name].render(**slots) in learnt and pack[name].parser == "text"


def test_a_pack_of_ones_own_stands_before_the_default(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("questions:\n  text: 'Ask {num} things about {topic}: {{}}'\n  sampling: {temperature: 0.2}\n  parser: list\n")
    pack = TemplatePack.load(str(path))
    assert pack["questions"].render(num=3, topic="bees") == "Ask 3 things about bees: {}"
    assert pack["questions"].sampling.temperature == 0.2 and pack["subtopics"].text == TemplatePack.load()["subtopics"].text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("questions: {text: 'about {subject}'}", "the slot 'subject', which nobody fills: the slots are num, topic"),
        ("questions: {slots: [topic], text: 'about {subject}'}", "uses the slot 'subject' that it does not declare"),
        ("questions: {text: 'about {topic'}", "cannot be read"),
        ("questions: {text: '{topic.__class__}'}", "slot 'topic.__class__'"),
        ("questions: {text: hi, voice: loud}", "unknown key 'voice'"),
        ("questions: {text: hi, parser: prose}", "parser 'prose': use one of text, list, yes"),
        ("questions: {text: hi, parser: yes}", "use 'list' or 'text'"),
        ("questions: {text: hi, sampling: {heat: 1}}", "sampling must be a mapping of temperature"),
        ("questions: {text: hi, sampling: {temperature: -1}}", "temperature must be 0"),
        ("questions: {text: 'about {topic!x}'}", "braces that are no slot"),
        ("questions: {text: 'about {topic:{num}}'}", "braces that are no slot"),
        ("questions: {text: 'about {}'}", "braces that are no slot"),
        ("questions: {slots: 5, text: hi}", "slots must be a list of names"),
        ("questions: {text: hi, sampling: {temperature: hot}}", "the values of sampling must be numbers"),
        ("5: {text: hi}", "has a template '5' that no pipeline uses"),
        ("question: {text: hi}", "that no pipeline uses; did you mean 'questions'"),
        ("- questions", "must be a mapping"),
        ("questions: [", "is not YAML"),
        ("questions: {slots: []}", "must have a text"),
    ],
)
def test_a_wrong_pack_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words.replace("(", r"\(").replace(".", r"\.")):
        TemplatePack.load(str(path))


def test_a_pack_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="no template pack 'nemo': give a .yaml file or one of default, miniature"):
        TemplatePack.load("nemo")
    with pytest.raises(InputError, match="cannot be read"):
        TemplatePack.load("/nowhere/pack.yaml")
