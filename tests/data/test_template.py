# ruff: noqa: E501 (the templates)
"""Chat templates of model folders: what transformers' `apply_chat_template` gives is the reference."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from gristmill.core.errors import InputError
from gristmill.data.chat import FORMATS, OWN, PLAIN, ChatFormat, Message, Role, TemplateFormat, find_format, guess_format, with_template_of
from gristmill.data.tokenizer import Tokenizer

# ---- tokenizers of the kinds that model families have ----

WORDS = [
    "user\n\nassistant\n system the mill grinds what you ask\n\n\nYes. Hello there! 12 stones? <think>\n\n</think>\n\n",
    "User:\nAssistant:\n[INST] <<SYS>>\n a  b\n\n[/INST] {'name': \"x\"} model\n   spaced\n",
] * 30
BLANK = "\u2581"


def byte_level(special: list[AddedToken], pattern: str = "") -> HFTokenizer:
    """GPT-2's kind, or Llama 3's and Qwen's with their pattern."""
    backend = HFTokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level]) if pattern else level
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(WORDS, trainer)
    return backend


def tiktoken(special: list[AddedToken]) -> HFTokenizer:
    return byte_level(special, r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def sentencepiece(special: list[AddedToken], *, legacy: bool = True) -> HFTokenizer:
    """Llama 2's kind: bytes for what it does not know, and a blank before the first word."""
    backend = HFTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    names = [*special, *(AddedToken(f"<0x{byte:02X}>", special=True) for byte in range(256))]
    marked = [text.replace(" ", BLANK) for text in WORDS]
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(f"{BLANK}?[^{BLANK}\\n]+|\n|{BLANK}"), "isolated")  # no token is of two words
    backend.train_from_iterator(marked, trainers.BpeTrainer(vocab_size=480, special_tokens=names, show_progress=False, max_token_length=8))
    described = json.loads(backend.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if not token["content"].startswith("<0x")]
    backend = HFTokenizer.from_str(json.dumps(described | {"pre_tokenizer": None}))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return backend


def modern(special: list[AddedToken]) -> HFTokenizer:
    return sentencepiece(special, legacy=False)


# ---- templates that behave as the published ones ----

ALTERNATE = (
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set talk = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set talk = messages %}{% set system = false %}{% endif %}"
    "{% for message in talk %}" + ALTERNATE + "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message.content %}{% else %}{% set content = message.content %}{% endif %}"
    "{% if message.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is defined and tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- if tools is defined and tools is not none %}
    {%- set first = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
    {{- "<|start_header_id|>user<|end_header_id|>\\n\\nGiven the following functions, answer with JSON.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) + "\\n\\n" }}
    {%- endfor %}
    {{- first + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == "tool" or "tool_calls" in message) %}
        {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" + message.content | trim + "<|eot_id|>" }}
    {%- elif "tool_calls" in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
QWEN_TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\nYou may call functions within <tools></tools>:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" + (tool | tojson) }}
    {%- endfor %}
    {{- "\\n</tools>\\nCall with <tool_call></tool_call>.<|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
"""
QWEN_CALLS = """        {%- for call in message.tool_calls %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
"""
QWEN_RESULTS = """    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
"""
QWEN25 = (
    QWEN_TOOLS
    + """{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "system" and not loop.first or message.role == "assistant" and not message.tool_calls %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
"""
    + QWEN_CALLS
    + QWEN_RESULTS
    + """{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
)
QWEN3 = (
    QWEN_TOOLS
    + """{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or thought) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
"""
    + QWEN_CALLS
    + QWEN_RESULTS
    + """{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
)
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}
    {%- set talk = messages[1:] %}
{%- else %}
    {%- set talk = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set asked = talk | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in talk %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in talk %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == asked[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": ' + tool | tojson + "}" }}
                {{- ", " if not loop.last else "]" }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system is defined %}
            {{- "[INST] " + system + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {%- set out = call.function | tojson %}
            {{- out[:-1] }}
            {%- if not call.id is defined or call.id | length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + call.id + '"}' }}
            {{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SMOLLM3 = """{%- if enable_thinking is not defined %}
{%- set enable_thinking = true %}
{%- endif %}
{%- set mode = "/think" if enable_thinking else "/no_think" %}
{{- "<|im_start|>system\\n## Metadata\\n\\nReasoning Mode: " + mode + "\\n\\n" }}
{%- if messages[0].role == "system" %}
{{- messages[0].content.replace("/no_think", "").rstrip() }}
{%- endif %}
{{- "<|im_end|>\\n" }}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "user" -%}
        {{ "<|im_start|>" + message.role + "\\n" + content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" -%}
        {% generation %}
        {%- if mode == "/think" -%}
            {{ "<|im_start|>assistant\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- else -%}
            {{ "<|im_start|>assistant\\n" + "<think>\\n\\n</think>\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- endif -%}
        {% endgeneration %}
    {%- elif message.role == "tool" -%}
        {{ "<|im_start|>user\\n" + content + "<|im_end|>\\n" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if mode == "/think" -%}
        {{ "<|im_start|>assistant\\n" }}
    {%- else -%}
        {{ "<|im_start|>assistant\\n" + "<think>\\n\\n</think>\\n" }}
    {%- endif -%}
{%- endif -%}
"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}" + ALTERNATE + "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' + message.content.split('</think>')[-1] + '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
HEADS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
MARKS = [
    *("<s>", "</s>", "<unk>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
]
Kind = Callable[[list[AddedToken]], HFTokenizer]
# template, tokenizer, control tokens, bos_token, eos_token
FAMILIES: dict[str, tuple[str, Kind, list[str], str | None, str]] = {
    "llama2": (LLAMA2, sentencepiece, ["<s>", "</s>", "<unk>"], "<s>", "</s>"),
    "llama2 as converted today": (LLAMA2, modern, ["<s>", "</s>", "<unk>"], "<s>", "</s>"),
    "llama3": (LLAMA3, tiktoken, HEADS, "<|begin_of_text|>", "<|eot_id|>"),
    "llama3.1": (LLAMA31, tiktoken, HEADS, "<|begin_of_text|>", "<|eot_id|>"),
    "qwen2.5": (QWEN25, tiktoken, IM, None, "<|im_end|>"),
    "qwen3": (QWEN3, tiktoken, IM, None, "<|im_end|>"),
    "mistral v0.3": (MISTRAL, modern, MARKS, "<s>", "</s>"),
    "smollm2": (SMOLLM2, byte_level, IM, "<|im_start|>", "<|im_end|>"),
    "smollm3": (SMOLLM3, tiktoken, IM, None, "<|im_end|>"),
    "gemma": (GEMMA, modern, ["<bos>", "<eos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "phi3": (PHI3, sentencepiece, ["<s>", "<unk>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "<s>", "<|endoftext|>"),
    "zephyr": (ZEPHYR, sentencepiece, ["<s>", "</s>", "<unk>"], "<s>", "</s>"),
    "chatml": (CHATML, byte_level, IM, None, "<|im_end|>"),
    "chatml with a begin": ("{{ bos_token }}" + CHATML, tiktoken, IM, "<|endoftext|>", "<|im_end|>"),
    "r1": (R1, tiktoken, IM, "<|endoftext|>", "<|im_end|>"),
}  # fmt: skip
TOOLS_OF = ("llama3.1", "qwen2.5", "qwen3", "mistral v0.3")
NO_SYSTEM = ("gemma",)
each_family = pytest.mark.parametrize("family", FAMILIES)


def write_folder(folder: Path, backend: HFTokenizer, template: Any, bos: str | None, eos: str, **more: Any) -> None:
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "chat_template": template} | more
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


class Model:
    """A folder's tokenizer and chat format, and transformers' reading of the same folder."""

    def __init__(self, folder: Path) -> None:
        self.theirs = transformers.AutoTokenizer.from_pretrained(folder)
        self.tokenizer = Tokenizer.load(folder)
        self.format: ChatFormat = guess_format(self.tokenizer)

    def reference(self, turns: Any, *, ask: bool, **more: Any) -> list[int]:
        found = self.theirs.apply_chat_template(turns, add_generation_prompt=ask, tokenize=True, return_dict=False, **more)
        return list(found)


@cache
def model(family: str) -> Model:
    template, kind, names, bos, eos = FAMILIES[family]
    strip = family == "phi3"  # whose tokens swallow the white space behind them
    backend = kind([AddedToken(name, special=True, normalized=False, rstrip=strip and "|" in name) for name in names])
    backend.add_tokens(
        [AddedToken(name, special=False, normalized=False) for name in THINK if family.startswith(("qwen", "smollm3", "r1"))]
    )
    with TemporaryDirectory() as folder:
        write_folder(Path(folder), backend, template, bos, eos)
        return Model(Path(folder))


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
    ],
)
def test_a_lossy_tokenizer_is_refused(tmp_path: Path, normalizer: Any, lost: str) -> None:
    write_folder(tmp_path, lossy(normalizer), None, None, "</s>")
    with pytest.raises(InputError, match=f"loses {lost}"):
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
