# ruff: noqa: E501 (the templates)
"""Chat templates of model folders: what transformers' `apply_chat_template` gives is the reference."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from gristmill.core.errors import InputError
from gristmill.data.chat import Message, Role
from gristmill.data.chat_format import FORMATS
from gristmill.data.find_format import PLAIN, find_format, guess_format, with_template_of
from gristmill.data.template_format import OWN, TemplateFormat
from gristmill.data.tokenizer import Tokenizer
from tests.data.template_families import (
    CHATML,
    FAMILIES,
    IM,
    NO_SYSTEM,
    QWEN3,
    QWEN25,
    R1,
    SMOLLM2,
    TOOLS_OF,
    WORDS,
    ZEPHYR,
    Model,
    byte_level,
    each_family,
    model,
    modern,
    sentencepiece,
    tiktoken,
    write_folder,
)


def messages(turns: list[dict[str, Any]]) -> list[Message]:
    out = []
    for turn in turns:
        fields = {name: value for name, value in turn.items() if name not in ("role", "content")}
        if turn.get("content") is None:
            fields["content"] = None
        out.append(Message(turn["role"], turn.get("content") or "", fields=json.dumps(fields) if fields else ""))
    return out


def talk(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    roles: tuple[Role, Role] = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


TALKS = [
    talk("What does the mill grind?"),
    talk("Hi", system="You are terse."),
    talk("Hi", "Hello!", "  two blanks \n\nwhat is 1234 + 5?  "),
    talk("na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f642\U0001f642 \u200b"),
    talk("\n\na line break first", "and one behind\n", "\tx"),
    talk("a", "b", "c", "d", "e", system="s"),
    talk("1", "<think>\nhm\n</think>\n\n2", "3", "<think>\nwell\n</think>\n\n4", "5"),
    talk(""),
]


@each_family
def test_prompts_are_those_of_transformers(family: str) -> None:
    own = model(family)
    for turns in TALKS:
        if turns[0]["role"] == "system" and family in NO_SYSTEM:
            with pytest.raises(InputError, match="refuses the conversation: System role not supported"):
                own.format.render_prompt(messages(turns), own.tokenizer)
            continue
        assert own.format.render_prompt(messages(turns), own.tokenizer) == own.reference(turns, ask=True), turns


@each_family
def test_whole_conversations_are_those_of_transformers(family: str) -> None:
    own = model(family)
    for turns in (talk("Hi", "Hello there!"), talk("What is it?", "Yes. A mill.", "12 stones?", "\u00e9t\u00e9 7.")):
        if family == "r1":
            with pytest.raises(InputError, match="another way than it asks"):
                own.format.render(messages(turns), own.tokenizer)
        else:
            assert own.format.render(messages(turns), own.tokenizer).ids == own.reference(turns, ask=False)


def control(own: Model, ids: list[int]) -> list[str]:
    return [own.tokenizer.name_of(token) for token in ids if token in own.tokenizer.control_ids]


def trained(own: Model, turns: list[dict[str, Any]], **more: Any) -> list[str]:
    """Text of each run of trained tokens."""
    out: list[list[int]] = []
    rendered = own.format.render(messages(turns), own.tokenizer, **more)
    before = False
    for token, now in zip(rendered.ids, rendered.mask, strict=True):
        if now and not before:
            out.append([])
        if now:
            out[-1].append(token)
        before = now
    return [own.theirs.decode(ids) for ids in out]


# What is trained of an answer "Hello there!": its words and the end of its turn, nothing that the prompt supplies.
SAID = {
    **dict.fromkeys(FAMILIES, "Hello there!<|im_end|>"),
    "llama2": "Hello there! </s>",
    "llama2 as converted today": "Hello there! </s>",
    "llama3": "Hello there!<|eot_id|>",
    "llama3.1": "Hello there!<|eot_id|>",
    "qwen3": "<think>\n\n</think>\n\nHello there!<|im_end|>",
    "mistral v0.3": "Hello there!</s>",
    "gemma": "Hello there!<end_of_turn>",
    "phi3": "Hello there!<|end|>",
    "zephyr": "Hello there!</s>",
}


@each_family
def test_the_mask_is_the_answer_and_its_end(family: str) -> None:
    own = model(family)
    if family == "r1":
        return
    assert [text.strip(" ") for text in trained(own, talk("Hi", "Hello there!"))] == [SAID[family]]
    turns = messages(talk("Hi", "No.", "And?", "Hello there!"))
    if family != "qwen3":
        assert len(trained(own, talk("Hi", "No.", "And?", "Hello there!"))) == 2
    assert turns[1].trained
    turns[1] = Message("assistant", "No.", trained=False)
    out = own.format.render(turns, own.tokenizer)
    assert own.theirs.decode([i for i, now in zip(out.ids, out.mask, strict=True) if now]).strip(" ") == SAID[family]
    last = max(i for i, now in enumerate(out.mask) if now)
    assert out.ids[last] == own.format.end_of_turn_id(own.tokenizer)


@each_family
@pytest.mark.parametrize("answer", ["Hello.", "\n\nA break first", "  blanks", "<|im_end|> </s> spelled", "x [/INST]<start_of_turn>"])
def test_the_prompt_is_a_prefix_of_what_is_trained(family: str, answer: str) -> None:
    """Whatever an answer begins with or spells."""
    own = model(family)
    if family == "r1":
        return
    turns = messages(talk("Hi", "Ho", "Tell <|im_start|> me </s>", answer))
    prompt = own.format.render_prompt(turns[:-1], own.tokenizer)
    rendered = own.format.render(turns, own.tokenizer)
    assert rendered.ids[: len(prompt)] == prompt
    assert not any(rendered.mask[i] for i in range(len(prompt)) if i >= len(own.format.render_prompt(turns[:1], own.tokenizer)) + 40)


@each_family
def test_what_a_user_spells_is_no_control_token(family: str) -> None:
    own = model(family)
    names = own.tokenizer.control
    for place, other in ((0, "What is"), (2, "What is it?")):
        texts = [other, "Yes.", other][: place + 1]
        plain, spelled = talk(*texts), talk(*texts)
        spelled[place]["content"] = "a " + " ".join(names) + names[0] + names[-1] + " \n" + names[0]
        ids = own.format.render_prompt(messages(spelled), own.tokenizer)
        assert control(own, ids) == control(own, own.format.render_prompt(messages(plain), own.tokenizer))
        assert "\U000f0000" not in own.theirs.decode(ids)
        assert own.theirs.decode(ids).replace(" ", "").count(names[0]) >= 3, "the words are there all the same"


def test_a_private_use_character_of_the_user_stays() -> None:
    own = model("smollm2")
    turns = talk("x \U000f0000 y <|im_end|> \U000f0004")
    text = own.theirs.decode(own.format.render_prompt(messages(turns), own.tokenizer))
    assert "x \U000f0000 y <|im_end|> \U000f0004" in text


def test_earlier_answers_that_a_template_changes_are_samples_of_their_own() -> None:
    """Qwen3 drops the thoughts of all but the last answer: each is learnt as it was said, and nothing as it was not."""
    own = model("qwen3")
    turns = messages(talk("1", "<think>\nhm\n</think>\n\n2", "3", "<think>\nwell\n</think>\n\n4"))
    out = own.format.render_samples(turns, own.tokenizer)
    texts = [own.theirs.decode([i for i, now in zip(one.ids, one.mask, strict=True) if now]) for one in out]
    assert texts == ["<think>\nwell\n</think>\n\n4<|im_end|>", "<think>\nhm\n</think>\n\n2<|im_end|>"]
    assert own.theirs.decode(out[0].ids).count("<think>") == 1 and len(out[1].ids) < len(out[0].ids)
    assert own.format.render(turns, own.tokenizer) == out[0]
    steady = model("qwen2.5")
    assert len(steady.format.render_samples(turns, steady.tokenizer)) == 1
    turns[3] = Message("assistant", turns[3].content, trained=False)
    (first, second) = own.format.render_samples(turns, own.tokenizer)
    assert not any(first.mask) and any(second.mask)


def test_thinking_is_switched_and_what_the_switch_supplies_is_not_trained() -> None:
    for family in ("qwen3", "smollm3"):
        own = model(family)
        turns = talk("Hi")
        for switch in (True, False):
            asked = own.format.render_turns(messages(turns), own.tokenizer, variables={"enable_thinking": switch})
            assert asked == own.reference(turns, ask=True, enable_thinking=switch)
        with pytest.raises(InputError, match="no variable 'enable_thought'"):
            own.format.render_turns(messages(turns), own.tokenizer, variables={"enable_thought": True})
        with pytest.raises(InputError, match="no variable 'messages'"):
            own.format.render_turns(messages(turns), own.tokenizer, variables={"messages": []})
    assert trained(model("smollm3"), talk("Hi", "Ho")) == ["Ho<|im_end|>"], "its tag encloses the header, too"


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "mill",
            "description": "Grinds <|im_end|> caf\u00e9.",
            "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}},
        },
    }
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "mill", "arguments": {"n": 12}}}
WITH_TOOLS = [
    {"role": "user", "content": "Grind 12."},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "3 sacks", "tool_call_id": "abcdefghi", "name": "mill"},
    {"role": "assistant", "content": "It is done."},
]


@pytest.mark.parametrize("family", TOOLS_OF)
def test_tools_calls_and_their_answers(family: str) -> None:
    own = model(family)
    safe = json.loads(json.dumps(TOOLS).replace("<|im_end|> ", ""))
    for turns in (WITH_TOOLS[:1], WITH_TOOLS[:3]):
        found = own.format.render_turns(messages(turns), own.tokenizer, tools=safe)
        assert found == own.reference(turns, ask=True, tools=safe)
        spelled = own.format.render_turns(messages(turns), own.tokenizer, tools=TOOLS)
        assert control(own, spelled) == control(own, found)
    samples = own.format.render_samples(messages(WITH_TOOLS), own.tokenizer, tools=safe)
    texts = [own.theirs.decode([i for i, now in zip(one.ids, one.mask, strict=True) if now]) for one in samples]
    assert len(texts) == 1 + (family == "qwen3") and "It is done." in texts[0]  # Qwen3 writes a thought into the last turn alone
    assert '"mill"' in texts[-1] and "12" in texts[-1] and not any("sacks" in text for text in texts)
    assert sum(text.count(own.tokenizer.name_of(own.format.end_of_turn_id(own.tokenizer))) for text in texts) == 2


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in TOOLS_OF])
def test_tools_are_refused_where_a_template_has_no_place_for_them(family: str) -> None:
    own = model(family)
    with pytest.raises(InputError, match="no place for tools"):
        own.format.render_turns(messages(WITH_TOOLS[:1]), own.tokenizer, tools=TOOLS)
    with pytest.raises(InputError, match="no place for 'tool_calls'"):
        own.format.render(messages(WITH_TOOLS), own.tokenizer)
    if family in ("llama2", "gemma", "phi3", "zephyr"):
        with pytest.raises(InputError, match="no place for answers of tools"):
            own.format.render_turns(messages([*talk("a", "b"), WITH_TOOLS[2]]), own.tokenizer)


def test_an_answer_goes_on() -> None:
    for family in ("chatml", "llama3", "qwen2.5", "mistral v0.3"):
        own = model(family)
        for text in ("The mill is", "The mill \n"):
            turns = talk("Hi", text)
            found = own.format.render_turns(messages(turns), own.tokenizer, continue_final_message=True)
            assert found == own.reference(turns, ask=False, continue_final_message=True)


@pytest.mark.parametrize("more", [{}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}])
@pytest.mark.parametrize("family", ["llama2", "zephyr", "phi3"])
def test_llamas_class_of_tokenizers_puts_blanks_as_transformers_does(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    template, kind, names, bos, eos = FAMILIES[family]
    backend = kind([AddedToken(name, special=True, normalized=False) for name in names])
    write_folder(tmp_path, backend, template, bos, eos, tokenizer_class="LlamaTokenizer", unk_token="<unk>", **more)
    own = Model(tmp_path)
    for turns in TALKS:
        assert own.format.render_prompt(messages(turns), own.tokenizer) == own.reference(turns, ask=True), turns
    turns = messages(talk("Hi", "Hello there!", "And <s> so?", "  Yes."))
    prompt = own.format.render_prompt(turns[:3], own.tokenizer)
    assert own.format.render(turns, own.tokenizer).ids[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [(sentencepiece, "mistral"), (sentencepiece, "phi3"), (sentencepiece, "llama"), (tiktoken, "llama"), (tiktoken, "")],
)
def test_llamas_class_is_passed_over_where_transformers_does(tmp_path: Path, kind: Any, model_type: str) -> None:
    """With Mistral's and Phi-3's models, and for vocabularies of bytes, as those of DeepSeek-R1's distillations."""
    backend = kind([AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>", "<unk>")])
    write_folder(tmp_path, backend, ZEPHYR, "<s>", "</s>", tokenizer_class="LlamaTokenizerFast", unk_token="<unk>")
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    own = Model(tmp_path)
    for turns in TALKS[:5]:
        assert own.format.render_prompt(messages(turns), own.tokenizer) == own.reference(turns, ask=True), turns
    text = "a mill\n\n  grinds"
    assert own.tokenizer.encode(text) == own.theirs.encode(text, add_special_tokens=False)
    (tmp_path / "more").mkdir()
    changed = own.tokenizer.with_tokens(FORMATS["chatml"].special_tokens).with_chat_template(FORMATS["chatml"].template, cut=True)
    changed.save(tmp_path / "more")
    if model_type:
        (tmp_path / "more" / "config.json").write_text(json.dumps({"model_type": model_type}))
    own = Model(tmp_path / "more")
    for turns in TALKS[:5]:
        ids = own.format.render_prompt(messages(turns), own.tokenizer)
        assert ids == own.reference(turns, ask=True) == FORMATS["chatml"].render_prompt(messages(turns), changed), turns
    assert changed.encode(text) == own.tokenizer.encode(text) == own.theirs.encode(text, add_special_tokens=False)


# ---- templates that cannot be used ----


def made(template: Any, **more: Any) -> Tokenizer:
    tokenizer = Tokenizer.train(["hello"] * 3, 300, FORMATS["chatml"].special_tokens)
    tokenizer.chat_templates = {"default": template} | more
    return tokenizer


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 2 seconds"),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "writes more than"),
        ("{{ 'a' * 10**10 }}", "too much memory"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "calls itself"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace(__class__='x') %}{{ messages[0].content }}", "begin with _"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for %}", "line 1"),
        ("{{ nothing.x }}", "'nothing' is undefined"),
        ("{{ raise_exception('no \x1b[31mway') }}", r"no \\x1b\[31mway"),
        ("Hello", "what the user says"),
        ("x" * (1 << 21), "characters"),
    ],
)
def test_a_template_that_cannot_be_used_gets_one_sentence(template: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        guess_format(made(template))
    assert "\n" not in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 400
    assert find_format("chatml", made(template)) is FORMATS["chatml"], "a format that is named needs no template"


def test_rendering_goes_on_after_a_template_that_was_stopped() -> None:
    with pytest.raises(InputError, match="more than 2 seconds"):
        guess_format(made("{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}"))
    own = model("chatml")
    assert own.format.render_prompt(messages(talk("Hi")), own.tokenizer) == own.reference(talk("Hi"), ask=True)


def test_a_template_that_ends_no_answer_trains_nothing() -> None:
    tokenizer = made(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    own = guess_format(tokenizer)
    assert own.render_prompt(messages(talk("Hi")), tokenizer) and own.end_of_turn_id(tokenizer) == tokenizer.eos_id
    with pytest.raises(InputError, match="no control token"):
        own.render(messages(talk("Hi", "Ho")), tokenizer)


def test_the_tag_says_where_an_answer_begins_if_the_prompt_does_not() -> None:
    marked = R1.replace(
        "{{ '<|im_start|>assistant\\n' + message.content.split('</think>')[-1] + '<|im_end|>' }}",
        "{{ '<|im_start|>assistant\\n' }}{% generation %}{{ message.content }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    assert marked != R1
    tokenizer = made("{% set bos_token = '' %}" + marked)
    own = guess_format(tokenizer)
    out = own.render(messages(talk("Hi", "Ho", "a", "b")), tokenizer)
    assert tokenizer.decode([i for i, now in zip(out.ids, out.mask, strict=True) if now], keep_special=True) == "Ho<|im_end|>b<|im_end|>"


def test_a_system_turn_that_is_written_into_the_last_user_turn_is_trained_as_it_is_asked() -> None:
    """Mistral's templates say it where the last turn is the user's, and not at all where an answer follows."""
    own = model("mistral v0.3")
    turns = talk("Hi", "Ho", "And?", "Yes.", system="Be kind.")
    out = own.format.render_samples(messages(turns), own.tokenizer)
    assert len(out) == 2
    for sample, answer in zip(out, (4, 2), strict=True):
        prompt = own.reference(turns[:answer], ask=True)
        assert sample.ids[: len(prompt)] == prompt and sample.mask == [i >= len(prompt) for i in range(len(sample.ids))]
        assert own.theirs.decode(sample.ids[len(prompt) :]).strip() == turns[answer]["content"] + "</s>"
    assert own.format.render(messages(turns), own.tokenizer) == out[0]
    turns[3] = turns[3] | {"content": "[/INST] spelled</s>"}
    assert control(own, own.format.render(messages(turns), own.tokenizer).ids) == control(own, out[0].ids)


def test_an_answer_in_several_tags_and_a_header_within_one() -> None:
    header, asked = "<|im_start|>assistant\n", "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    user = "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% else %}"
    several = (
        user + "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    within = user + "{% generation %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>' }}{% endgeneration %}{% endif %}{% endfor %}"
    end = "{% elif messages[-1].role == 'assistant' %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
    for template in (several + asked + end, within + asked + "{{ '<think>\n' }}{% endif %}"):
        tokenizer = made(template)
        out = guess_format(tokenizer).render(messages(talk("Hi", "Ho", "a", "<b>")), tokenizer)
        kept = [i for i, now in zip(out.ids, out.mask, strict=True) if now]
        assert tokenizer.decode(kept, keep_special=True) == "Ho<|im_end|><b><|im_end|>"
        assert tokenizer.decode(out.ids, keep_special=True).count(header) == 2


# ---- which format a folder has ----


def test_a_template_of_a_known_format_is_rendered_as_that_one(tmp_path: Path) -> None:
    for name, known in FORMATS.items():
        tokenizer = Tokenizer.train(WORDS, 420, known.special_tokens)
        tokenizer.save(tmp_path / name, known.template)
        saved = Tokenizer.load(tmp_path / name)
        assert guess_format(saved) is known
        saved.chat_templates = {"default": known.template + "{{ ' ' }}"}
        assert guess_format(saved).name == OWN
        saved.chat_templates = {"default": "{# another text of the same meaning #}" + known.template}
        assert guess_format(saved) is known
    assert isinstance(model("smollm2").format, TemplateFormat) and model("smollm2").format.name == OWN


def test_named_templates_and_jinja_files(tmp_path: Path) -> None:
    tools = "{{ 'TOOLS ' ~ tools | length }}" + CHATML
    backend = byte_level([AddedToken(name, special=True, normalized=False) for name in IM])
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": tools}]
    write_folder(tmp_path, backend, named, None, "<|im_end|>")
    own = Model(tmp_path)
    for tools_given in ([], TOOLS):
        found = own.format.render_turns(messages(talk("Hi")), own.tokenizer, tools=tools_given)
        assert found == own.reference(talk("Hi"), ask=True, tools=tools_given or None)
    (tmp_path / "chat_template.jinja").write_text(SMOLLM2)
    own = Model(tmp_path)
    assert own.format.render_prompt(messages(talk("Hi")), own.tokenizer) == own.reference(talk("Hi"), ask=True)
    assert "SmolLM" in own.theirs.decode(own.format.render_prompt(messages(talk("Hi")), own.tokenizer))
    (tmp_path / "chat_template.jinja").unlink()
    write_folder(tmp_path, backend, named[1:], None, "<|im_end|>")
    with pytest.raises(InputError, match="none of them is the default"):
        guess_format(Tokenizer.load(tmp_path))
    write_folder(tmp_path, backend, 5, None, "<|im_end|>")
    with pytest.raises(InputError, match="is not a tokenizer configuration"):
        Tokenizer.load(tmp_path)


# ---- files ----


def test_a_loaded_folder_is_saved_byte_for_byte(tmp_path: Path) -> None:
    backend = tiktoken([AddedToken(name, special=True, normalized=False) for name in IM])
    (tmp_path / "a").mkdir()
    write_folder(tmp_path / "a", backend, None, "<|endoftext|>", "<|im_end|>", pad_token="<|endoftext|>", model_max_length=77)
    others = {
        "chat_template.jinja": QWEN3,
        "special_tokens_map.json": '{"pad_token":  "<|endoftext|>"}',
        "added_tokens.json": "{}",
        "merges.txt": "#v\n",
    }
    for name, text in others.items():
        (tmp_path / "a" / name).write_text(text)
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"\0\xff")
    (tmp_path / "a" / "additional_chat_templates").mkdir()
    (tmp_path / "a" / "additional_chat_templates" / "tool_use.jinja").write_text(QWEN25)
    loaded = Tokenizer.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    files = sorted(str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 8
    for name in files:
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes(), name
    assert with_template_of(guess_format(loaded), loaded) is loaded, "training in the folder's own format changes nothing"
    changed = with_template_of(FORMATS["chatml"], loaded)
    changed.save(tmp_path / "c")
    again = Tokenizer.load(tmp_path / "c")
    assert again.chat_templates == {"default": FORMATS["chatml"].template} and guess_format(again) is FORMATS["chatml"]
    assert json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())["model_max_length"] == 77


def test_the_plain_format_needs_no_tokens_of_its_own(tmp_path: Path) -> None:
    for kind in (byte_level, tiktoken, modern, sentencepiece):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        write_folder(folder, kind([AddedToken(name, special=True, normalized=False) for name in ("<unk>", "</s>")]), None, None, "</s>")
        tokenizer = Tokenizer.load(folder)
        with pytest.raises(InputError, match="`plain`"):
            guess_format(tokenizer)
        plain = find_format("plain", tokenizer)
        turns = messages(talk("Hi", "Hello.", "And?", "\n\nSo."))
        out = plain.render(turns, tokenizer)
        prompt = plain.render_prompt(turns[:3], tokenizer)
        assert out.ids[: len(prompt)] == prompt and out.ids[max(i for i, now in enumerate(out.mask) if now)] == tokenizer.eos_id
        assert sum(out.mask[i] and out.ids[i] == tokenizer.eos_id for i in range(len(out.ids))) == 2
        assert plain.response_text(out.ids[len(prompt) :], tokenizer).strip() == "So."
        (folder / "out").mkdir()
        with_template_of(plain, tokenizer).save(folder / "out")
        own = Model(folder / "out")
        assert own.tokenizer.chat_templates == {"default": PLAIN}
        for turns in TALKS:
            assert own.format.render_prompt(messages(turns), own.tokenizer) == own.reference(turns, ask=True)
            assert own.format.render_prompt(messages(turns), own.tokenizer) == plain.render_prompt(messages(turns), tokenizer)


# ---- tokenizers that lose what they are given ----


def lossy(normalizer: Any) -> HFTokenizer:
    backend = byte_level([AddedToken("</s>", special=True)])
    backend.normalizer = normalizer
    return backend


@pytest.mark.parametrize(
    ("normalizer", "lost"),
    [
        (normalizers.Lowercase(), "capital letters"),
        (normalizers.BertNormalizer(), "capital letters"),
        (normalizers.BertNormalizer(lowercase=False), "line breaks"),
        (normalizers.Nmt(), "line breaks"),
        (normalizers.Replace(Regex(r"\s+"), " "), "line breaks"),
        (normalizers.Replace("\n", ""), "line breaks"),
        (normalizers.Replace(Regex(" {2,}"), " "), "blanks"),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "accents"),
        (normalizers.Strip(left=True, right=False), "line breaks at the beginning"),
        (normalizers.Strip(left=False, right=True), "line breaks at the end"),
        (normalizers.Replace("\t", " "), r"what tells ' ' from '\\t'"),
        (normalizers.Replace(Regex(r"\d"), "0"), "what tells '1' from '0'"),
        (normalizers.Replace(Regex("[,;]"), ""), "what tells ';' from ','"),
    ],
)
def test_a_lossy_tokenizer_is_refused(tmp_path: Path, normalizer: Any, lost: str) -> None:
    write_folder(tmp_path, lossy(normalizer), None, None, "</s>")
    with pytest.raises(InputError, match=f"loses {lost}"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_without_line_breaks_is_refused(tmp_path: Path) -> None:
    backend = HFTokenizer(models.BPE(unk_token="<unk>"))
    backend.train_from_iterator(["a b"] * 3, trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], show_progress=False))
    write_folder(tmp_path, backend, None, None, "</s>")
    with pytest.raises(InputError, match="loses line breaks"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.NFKC(), normalizers.NFD()])
def test_other_forms_of_the_same_text_are_no_loss(tmp_path: Path, normalizer: Any) -> None:
    write_folder(tmp_path, lossy(normalizer), None, None, "</s>")
    assert Tokenizer.load(tmp_path).eos == "</s>"


# ---- properties ----

PIECES = ["", " ", "\n", "\n\n", "  ", "\t", "Hi", "the mill", "Yes.", "</think>", "\u00e9\u4e2d\U0001f642", "<", "|>", "[INST]", "user\n"]


@pytest.mark.parametrize(
    "family", ["llama2", "llama2 as converted today", "qwen2.5", "qwen3", "mistral v0.3", "smollm2", "gemma", "phi3", "zephyr"]
)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_words_keep_the_promises(family: str, data: st.DataObject) -> None:
    """The prompt's ids are transformers' and a prefix of the training ids, the mask begins after them, and words make no control token."""
    own = model(family)
    words = st.lists(st.sampled_from([*PIECES, *own.tokenizer.control]) | st.text(max_size=3), max_size=4).map("".join)
    turns = talk(*data.draw(st.lists(words, min_size=2, max_size=4).filter(lambda texts: len(texts) % 2 == 0)))
    asked = messages(turns[:-1])
    prompt = own.format.render_prompt(asked, own.tokenizer)
    if not any(name in turn["content"] for turn in turns for name in own.tokenizer.control):
        assert prompt == own.reference(turns[:-1], ask=True)
    empty = own.format.render_prompt([Message(m.role, "x") for m in asked], own.tokenizer)
    assert control(own, prompt) == control(own, empty)
    for number, rendered in enumerate(own.format.render_samples(messages(turns), own.tokenizer)):
        last = max(i for i, now in enumerate(rendered.mask) if now)
        assert rendered.ids[last] == own.format.end_of_turn_id(own.tokenizer)
        if number == 0:
            assert rendered.ids[: len(prompt)] == prompt and all(rendered.mask[len(prompt) : last + 1])
            assert not rendered.mask[len(prompt) - 1] and not any(rendered.mask[last + 1 :])
