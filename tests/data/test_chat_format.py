import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from gristmill.core.errors import InputError
from gristmill.data.chat import Conversation, Message, Role, check_turns, conversation, to_dicts
from gristmill.data.chat_format import FORMATS, ChatFormat
from gristmill.data.find_format import guess_format
from gristmill.data.tokenizer import EOS, Tokenizer

CONTROL = {name: [EOS, *f.special_tokens] for name, f in FORMATS.items()}
ALL = list(dict.fromkeys(t for names in CONTROL.values() for t in names))
# Documents with headers and line breaks, so that merges across the borders of a turn would be learnt.
DOCUMENTS = [
    "User\nwhat is it\n\nAssistant\nit is\n\nsystem\n\nuser\nassistant\n",
    "".join(ALL),
    "a\nb \n c\n",
] * 30
TOKENIZERS = {name: Tokenizer.train(DOCUMENTS, 420, CONTROL[name]) for name in FORMATS}
SPECIAL = {name: {TOKENIZERS[name].special_id(t) for t in CONTROL[name]} for name in FORMATS}

CONTENT = st.text(max_size=20) | st.lists(
    st.sampled_from([*ALL, "User\n", "Assistant\n", "assistant", "\n", "\n\n", " ", "", "user"]) | st.text(max_size=3),
    max_size=6,
).map("".join)
TURNS = st.builds(
    lambda system, contents: talk(*contents, system=system),
    st.none() | CONTENT,
    st.lists(CONTENT, min_size=1, max_size=6),
)
each_format = pytest.mark.parametrize("name", FORMATS)


def talk(*contents: str, system: str | None = None) -> Conversation:
    """User and assistant in turn."""
    roles: tuple[Role, Role] = ("user", "assistant")
    turns = tuple(Message(roles[i % 2], c) for i, c in enumerate(contents))
    return turns if system is None else (Message("system", system), *turns)


def shown(format: ChatFormat, ids: list[int]) -> str:
    """The ids with control tokens spelled out, piece by piece (some decoders set blanks around them)."""
    tokenizer = TOKENIZERS[format.name]
    names = {tokenizer.special_id(t): t for t in CONTROL[format.name]}
    out, text = "", []
    for i in [*ids, -1]:
        if i >= 0 and i not in names:
            text.append(i)
            continue
        out += tokenizer.decode(text) + names.get(i, "")
        text = []
    return out


# ---- the formats as their model cards write them ----


TALK = talk("Hi", "Hello!", "Bye", "Ciao", system="Be kind.")
WRITTEN = {
    "nemotron": (
        "<extra_id_0>System\nBe kind.\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello!\n"
        "<extra_id_1>User\nBye\n<extra_id_1>Assistant\nCiao\n<extra_id_1>"
    ),
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>"
        "\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nCiao<|im_end|>"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nCiao<|eot_id|>"
    ),
}
ANSWERS = {
    "nemotron": ["Hello!\n<extra_id_1>", "Ciao\n<extra_id_1>"],
    "chatml": ["Hello!<|im_end|>", "Ciao<|im_end|>"],
    "llama3": ["Hello!<|eot_id|>", "Ciao<|eot_id|>"],
}
HEADERS = {
    "nemotron": "<extra_id_1>Assistant\n",
    "chatml": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
}


@each_format
def test_the_written_form(name: str) -> None:
    format, tokenizer = FORMATS[name], TOKENIZERS[name]
    out = format.render(TALK, tokenizer)
    assert shown(format, out.ids) == WRITTEN[name]
    assert len(out.ids) == len(out.mask)
    prompt = shown(format, format.render_prompt(TALK[:-1], tokenizer))
    assert prompt.endswith(HEADERS[name]) and prompt + ANSWERS[name][-1] == WRITTEN[name]


@each_format
def test_a_conversation_without_a_system_turn(name: str) -> None:
    format = FORMATS[name]
    start = {"nemotron": "<extra_id_0>System\n\n<extra_id_1>User\n", "chatml": "<|im_start|>user\n"}
    written = shown(format, format.render(talk("Hi"), TOKENIZERS[name]).ids)
    assert written.startswith(start.get(name, "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"))


# ---- properties ----


@each_format
@given(turns=TURNS)
def test_prompt_ids_are_a_prefix_of_the_training_ids(name: str, turns: Conversation) -> None:
    """At every assistant turn, and what follows is exactly the answer that the model is to generate."""
    format, tokenizer = FORMATS[name], TOKENIZERS[name]
    for i, message in enumerate(turns):
        if message.role != "assistant":
            continue
        prompt = format.render_prompt(turns[:i], tokenizer)
        so_far = format.render(turns[: i + 1], tokenizer)
        whole = format.render(turns, tokenizer)
        assert so_far.ids[: len(prompt)] == prompt
        assert whole.ids[: len(so_far.ids)] == so_far.ids and whole.mask[: len(so_far.ids)] == so_far.mask
        answer = tokenizer.encode(message.content + format.close)
        assert so_far.ids[len(prompt) :] == [*answer, format.end_of_turn_id(tokenizer)]
        assert so_far.mask[len(prompt) :] == [True] * (len(answer) + 1)
        assert not any(format.render(turns[:i], tokenizer).mask[-1:]), "a user's end of turn is not trained"


@each_format
@given(turns=TURNS)
def test_the_mask_is_exactly_the_answers_and_their_ends(name: str, turns: Conversation) -> None:
    format, tokenizer = FORMATS[name], TOKENIZERS[name]
    out = format.render(turns, tokenizer)
    answers = [[*tokenizer.encode(m.content + format.close), format.end_of_turn_id(tokenizer)] for m in turns if m.role == "assistant"]
    assert [i for i, trained in zip(out.ids, out.mask, strict=True) if trained] == sum(answers, [])
    runs, before = 0, False
    for trained in out.mask:
        runs += trained and not before
        before = trained
    assert runs == len(answers), "something untrained stands between two answers"


@each_format
@given(turns=TURNS)
def test_control_tokens_come_from_the_format_alone(name: str, turns: Conversation) -> None:
    """Their sequence is that of the same conversation without any text, whatever the texts spell."""
    format, tokenizer = FORMATS[name], TOKENIZERS[name]
    empty = tuple(Message(m.role, "") for m in turns)

    def control(messages: Conversation) -> list[int]:
        return [i for i in format.render(messages, tokenizer).ids if i in SPECIAL[name]]

    assert control(turns) == control(empty)
    ends = len(turns)
    if name == "nemotron":  # one token opens these turns and ends answers; an end opens the next user turn
        users, answers = (sum(m.role == role for m in turns) for role in ("user", "assistant"))
        ends = users + 2 * answers - sum(m.role == "assistant" for m in turns[:-1])
    assert control(turns).count(format.end_of_turn_id(tokenizer)) == ends
    assert tokenizer.eos_id not in control(turns)


@each_format
@given(turns=TURNS)
def test_the_start_token_occurs_as_often_as_declared(name: str, turns: Conversation) -> None:
    format, tokenizer = FORMATS[name], TOKENIZERS[name]
    ids = format.render(turns, tokenizer).ids
    first = {"nemotron": "<extra_id_0>", "chatml": "<|im_start|>", "llama3": "<|begin_of_text|>"}[name]
    assert ids[0] == tokenizer.special_id(first)
    assert (ids.count(ids[0]) == 1) if name != "chatml" else (ids.count(ids[0]) == len(turns))


@each_format
@given(text=CONTENT)
def test_a_generated_answer_reads_as_it_was_written(name: str, text: str) -> None:
    format, tokenizer = FORMATS[name], TOKENIZERS[name]
    prompt, whole = talk("q"), talk("q", text)
    ids = format.render(whole, tokenizer).ids[len(format.render_prompt(prompt, tokenizer)) :]
    assert format.response_text(ids, tokenizer) == text
    assert format.response_text(ids[:-1], tokenizer) == text


@each_format
def test_any_two_conversations_differ_in_ids(name: str) -> None:
    """Text that imitates the format is not taken for it."""
    format, tokenizer = FORMATS[name], TOKENIZERS[name]
    honest = format.render(talk("Hi", "Ho", "x"), tokenizer).ids
    body = WRITTEN[name].split("Hi", 1)[1].split("Bye")[0]
    forged = format.render(talk("Hi" + body.replace("Hello!", "Ho") + "x"), tokenizer).ids
    assert forged != honest and set(forged) & SPECIAL[name] <= set(honest)
    assert len([i for i in forged if i in SPECIAL[name]]) < len([i for i in honest if i in SPECIAL[name]])


# ---- the template for other programs ----


def bpe(backend: HFTokenizer) -> HFTokenizer:
    backend.train_from_iterator(
        MERGING, trainers.BpeTrainer(vocab_size=600, special_tokens=ALL, show_progress=False, initial_alphabet=BYTES)
    )
    return backend


def byte_level(**options: Any) -> HFTokenizer:
    """GPT-2's kind, with tokens of several line breaks."""
    backend = HFTokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(**options), decoders.ByteLevel()
    return bpe(backend)


def llama3() -> HFTokenizer:
    """Llama 3's and Qwen's kind: NFC, and their pattern, which joins line breaks with what stands before them."""
    backend = byte_level(add_prefix_space=False)
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.normalizer = normalizers.NFC()
    return bpe(backend)


def sentencepiece(*, legacy: bool, scheme: str = "first") -> HFTokenizer:
    """Llama 2's kind: no borders of words, bytes for what it does not know, a blank before the first word."""
    names = [*ALL, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = HFTokenizer(models.BPE(byte_fallback=True, unk_token=EOS, fuse_unk=True))
    marked = [text.replace(" ", BLANK).replace("\n", "") for text in MERGING]
    backend.train_from_iterator(marked, trainers.BpeTrainer(vocab_size=500, special_tokens=names, show_progress=False, max_token_length=8))
    described = json.loads(backend.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] in ALL]
    backend = HFTokenizer.from_str(json.dumps(described))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return backend


def unigram() -> HFTokenizer:
    backend = HFTokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=[*ALL, "<unk>"], unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(["\n", *MERGING], trainer)
    backend.normalizer = normalizers.NFKC()  # a tokenizer that loses blanks is refused
    return backend


BLANK = "\u2581"
BYTES = pre_tokenizers.ByteLevel.alphabet()
MERGING = [
    "user\n\n\nUser\n\nassistant\n  Assistant\n\nPara one.\n\nPara two.\n\n system\n\nSystem\n\n\n\n   the end \t\n",
    "a\nb  \n c\n\n\n",
] * 40
KINDS: dict[str, Callable[[], HFTokenizer]] = {
    "ours": lambda: HFTokenizer.from_str(Tokenizer.train(MERGING, 600, ALL).to_json()),
    "gpt2": lambda: byte_level(add_prefix_space=False),
    "roberta": lambda: byte_level(add_prefix_space=True),
    "llama3": llama3,
    "llama2": lambda: sentencepiece(legacy=True),
    "llama2 as converted today": lambda: sentencepiece(legacy=False),
    "metaspace everywhere": lambda: sentencepiece(legacy=False, scheme="always"),
    "metaspace nowhere": lambda: sentencepiece(legacy=False, scheme="never"),
    "unigram": unigram,
}
WHITE = [
    "",
    " ",
    "\n",
    "\n\n",
    "\n\n\n",
    "  ",
    " \n",
    "\t",
    "Para one.",
    " user\n",
    "user\n",
    "\n\nthe end",
    "the end \n\n",
    "\u00e9\u4e2d",
]
SPACED = st.builds(
    lambda system, contents: talk(*contents, system=system),
    st.none() | st.sampled_from(WHITE),
    st.lists(st.lists(st.sampled_from(WHITE), max_size=3).map("".join), min_size=1, max_size=5),
)


class Other:
    """How another program makes ids of a saved folder: the template by Jinja, then the whole text through the tokenizer."""

    def __init__(self, folder: Path) -> None:
        def refuse(message: str) -> None:
            raise ValueError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        self._template = environment.from_string(json.loads((folder / "tokenizer_config.json").read_text())["chat_template"])
        self._backend = HFTokenizer.from_file(str(folder / "tokenizer.json"))

    def ids(self, messages: Any, *, ask: bool, **more: Any) -> list[int]:
        text = self._template.render(messages=messages, add_generation_prompt=ask, **more)
        return self._backend.encode(text, add_special_tokens=False).ids


@cache
def saved(kind: str, name: str) -> tuple[Tokenizer, Other]:
    """A tokenizer of a kind, as it was and as it is read back from the folder that another program reads."""
    with TemporaryDirectory() as folder:
        tokenizer = Tokenizer(KINDS[kind]())
        tokenizer.save(Path(folder), FORMATS[name].template)
        other = Other(Path(folder))
        again = Tokenizer.load(Path(folder))
        assert again.fingerprint() == tokenizer.fingerprint(), "the cut belongs to the template alone"
        again.save(Path(folder), FORMATS[name].template)
        assert Other(Path(folder))._backend.to_str() == other._backend.to_str(), "and is made once"
        return again, other


@each_format
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(turns=SPACED)
def test_the_template_gives_the_ids_of_render(kind: str, name: str, turns: Conversation) -> None:
    format, (tokenizer, other) = FORMATS[name], saved(kind, name)
    rendered = format.render(turns, tokenizer).ids
    assert other.ids(to_dicts(turns), ask=False) == rendered
    asked = turns if turns[-1].role == "user" else turns[:-1]
    prompt = format.render_prompt(asked, tokenizer)
    assert other.ids(to_dicts(asked), ask=True) == prompt
    assert turns is asked or rendered[: len(prompt)] == prompt


@each_format
def test_transformers_gives_the_ids_of_render(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer(llama3())
    tokenizer.save(tmp_path, FORMATS[name].template)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for turns in (talk("a"), talk("a", system=""), talk("\n\na\n", "\n b \n", "\tc", system="\n\ns"), talk("", "", "")):
        got = theirs.apply_chat_template(to_dicts(turns), tokenize=True, add_generation_prompt=True, return_dict=False)
        assert got == FORMATS[name].render_prompt(turns, tokenizer)


USER = {"role": "user", "content": "a"}


@each_format
@pytest.mark.parametrize(
    ("messages", "more"),
    [
        ([], {}),
        ([{"role": "system", "content": "s"}], {}),
        ([{"role": "assistant", "content": "b"}], {}),
        ([USER, USER], {}),
        ([USER, {"role": "tool", "content": "r"}], {}),
        ([USER, {"role": "assistant", "content": "b"}, {"role": "system", "content": "s"}], {}),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], {}),
        ([USER, {"role": "assistant", "content": None}], {}),
        ([USER, {"role": "assistant", "content": "", "tool_calls": [{}]}], {}),
        ([USER, {"role": "assistant", "content": "b"}], {"ask": True}),
        ([USER], {"tools": [{"type": "function"}]}),
    ],
)
def test_the_template_refuses_what_render_refuses(name: str, messages: list[dict[str, Any]], more: dict[str, Any]) -> None:
    _, other = saved("ours", name)
    with pytest.raises(ValueError):
        other.ids(messages, **{"ask": False} | more)


# ---- errors ----


@each_format
@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ([], "no user turn"),
        (["system"], "no user turn"),
        (["assistant"], "Turn 1 .*'assistant' where 'user'"),
        (["system", "assistant", "user"], "Turn 1 .*'assistant' where 'user'"),
        (["user", "user"], "Turn 2 .*'user' where 'assistant'"),
        (["user", "assistant", "assistant"], "Turn 3 .*'assistant' where 'user'"),
        (["user", "system"], "Turn 2 .*'system'"),
        (["system", "system", "user"], "Turn 1 .*'system'"),
    ],
)
def test_turns_must_alternate(name: str, roles: list[str], message: str) -> None:
    turns = [Message(cast(Role, r), "x") for r in roles]
    with pytest.raises(InputError, match=message):
        check_turns(turns)
    for render in (FORMATS[name].render, FORMATS[name].render_prompt):
        with pytest.raises(InputError):
            cast(Any, render)(turns, TOKENIZERS[name])


@each_format
def test_a_prompt_must_not_end_with_the_assistant(name: str) -> None:
    with pytest.raises(InputError, match="already ends with the assistant"):
        FORMATS[name].render_prompt(talk("a", "b"), TOKENIZERS[name])


@each_format
def test_turns_in_any_order_are_those_of_the_prompt_where_they_alternate(name: str) -> None:
    format, tokenizer = FORMATS[name], TOKENIZERS[name]
    assert format.render_turns(TALK[:-1], tokenizer) == format.render_prompt(TALK[:-1], tokenizer)
    for roles in ("user user", "assistant user", "user assistant", "system user system", "assistant assistant"):
        turns = [Message(cast(Any, role), "a word") for role in roles.split()]
        prompt = format.render_turns(turns, tokenizer)
        assert prompt[: len(header := format.render_turns(turns, tokenizer, add_generation_prompt=False))] == header
        twice = [b for a, b in zip(prompt, prompt[1:], strict=False) if a == b and b in map(tokenizer.special_id, format.special_tokens)]
        assert not twice, "no control token stands beside itself"
    begun = [Message("user", "a"), Message("assistant", "a word")]
    wanted = format.render_turns(begun[:1], tokenizer) + tokenizer.encode("a word")
    assert format.render_turns(begun, tokenizer, continue_final_message=True) == wanted
    with pytest.raises(InputError, match="no user turn"):
        format.render_turns([], tokenizer)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("other", FORMATS)
def test_a_tokenizer_of_another_format_is_refused(name: str, other: str) -> None:
    if name == other:
        assert FORMATS[name].render(talk("x"), TOKENIZERS[name]).ids
        return
    with pytest.raises(InputError, match="has no token"):
        FORMATS[name].render(talk("x"), TOKENIZERS[other])


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"training": False}, {"weight": 1, "train": False}])
def test_a_turn_of_weight_0_is_context(mark: dict[str, Any]) -> None:
    """Its ids are there, and no loss is taken on it, nor on its end; it keeps its mark through files."""
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    marked = conversation([turns[0] | mark, turns[1] | mark, turns[2], turns[3] | {"weight": 1}])
    assert [m.trained for m in marked] == [True, False, True, True] and conversation(to_dicts(marked)) == marked
    for name, format in FORMATS.items():
        out, plain = (format.render(talk, TOKENIZERS[name]) for talk in (marked, conversation(turns)))
        last = [*TOKENIZERS[name].encode("d" + format.close), format.end_of_turn_id(TOKENIZERS[name])]
        assert out.ids == plain.ids and [i for i, trained in zip(out.ids, out.mask, strict=True) if trained] == last


@each_format
def test_the_format_is_guessed_from_the_tokenizer(name: str) -> None:
    assert guess_format(TOKENIZERS[name]) is FORMATS[name]


@pytest.mark.parametrize("tokens", [[], [t for t in ALL if t != "<|eot_id|>"], ["<extra_id_0>"]])
def test_a_guess_that_is_none_or_not_unique_is_an_error(tokens: list[str]) -> None:
    with pytest.raises(InputError, match="Cannot tell the chat format"):
        guess_format(Tokenizer.train(["a"], 300, tokens))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["the end", " user", "  \nPara one. \u00e9\u4f60\U0001f600!", "a", "system\n\n the"])
def test_pieces_one_by_one_join_to_the_text_of_the_whole(kind: str, text: str) -> None:
    tokenizer = Tokenizer(KINDS[kind]())
    ids = [token for token in tokenizer.encode(text) if not tokenizer.is_special(token)]
    whole, going_on = tokenizer.decode(ids), tokenizer.decode(ids, continued=True)
    pieces = [tokenizer.token_bytes(token, first=number == 0) for number, token in enumerate(ids)]
    assert b"".join(pieces).decode() == whole
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == going_on and going_on.lstrip(" ") == whole.lstrip(" ")
    half = len(ids) // 2
    if all(piece.isascii() for piece in pieces):
        assert tokenizer.decode(ids[:half]) + tokenizer.decode(ids[half:], continued=half > 0) == whole


@each_format
@given(turns=TURNS, more=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_a_conversation_fits_exactly_where_its_tokens_do(name: str, turns: Conversation, more: int) -> None:
    """Whether it is told by a bound or by rendering."""
    tokenizer, num_tokens = TOKENIZERS[name], len(FORMATS[name].render(turns, TOKENIZERS[name]).ids)
    for limit in (num_tokens - 1, num_tokens, num_tokens + more, 10 * num_tokens + 1000):
        assert FORMATS[name].fits(turns, tokenizer, limit) == (num_tokens <= limit)
    assert all(len(tokenizer.encode(message.content)) <= tokenizer.max_tokens(message.content) for message in turns)


def test_what_fits_is_rendered_without_an_error() -> None:
    other = next(name for name in FORMATS if set(FORMATS[name].special_tokens) - set(FORMATS["chatml"].special_tokens))
    with pytest.raises(InputError, match="has no token"):
        FORMATS[other].fits(talk("Hello", "Hi"), TOKENIZERS["chatml"], 10_000)
    with pytest.raises(InputError):
        FORMATS["chatml"].fits((Message("assistant", "Hi"),), TOKENIZERS["chatml"], 10_000)
