"""Training in a model folder's own chat template: what is saved is what was trained in."""

import json
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.chat_format import FORMATS
from gristmill.data.find_format import PLAIN, find_format, guess_format
from gristmill.data.readers import read_demonstrations
from gristmill.data.rows import Demonstration, read_rows, write_rows
from gristmill.data.tokenizer import Tokenizer
from gristmill.judge.reward import load_scorer
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.hf import load_model
from gristmill.model.hf_save import save_model
from gristmill.model.transformer import Transformer
from gristmill.train.objectives.sft import demonstration_samples
from gristmill.train.settings import training_section
from gristmill.workflows.train import train_model

TEMPLATE = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nBe kind.' + (tools | tojson if tools else '') + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + (message.content or '') }}"
    "{% for call in message.tool_calls or () %}{{ call.function.name + ' ' + call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
RATED = {"helpfulness": 3, "correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 1}
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Grind."},
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "mill", "arguments": '{"n": 1}'}}]},
    {"role": "tool", "content": "3 sacks"},
    {"role": "assistant", "content": "Done."},
]
TOOLS = [{"type": "function", "function": {"name": "mill"}}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer.train(["user assistant a b c"], 300, FORMATS["chatml"].special_tokens)
    tokenizer.save(folder / "t")
    config = json.loads((folder / "t" / "tokenizer_config.json").read_text()) | {"pad_token": "<|im_end|>", "model_max_length": 512}
    (folder / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "t" / "chat_template.jinja").write_text(TEMPLATE)
    blocks = uniform_blocks(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=32)
    model = Transformer(ModelConfig("nemotron", tokenizer.vocab_size, 16, blocks, max_positions=512))
    save_model(model, Tokenizer.load(folder / "t"), folder / "model")
    return folder / "model"


def rows_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_the_folders_own_template_is_trained_in_and_saved(base: Path, tmp_path: Path, kind: str) -> None:
    rows: dict[str, dict[str, Any]] = {
        "sft": {"prompt": "Hi <|im_end|>", "response": "Ho"},
        "reward": {"prompt": "Hi", "response": "Ho", **RATED},
        "dpo": {"prompt": "Hi", "chosen": "Ho", "rejected": "No"},
    }
    data = rows_of(tmp_path / "rows.jsonl", [rows[kind]] * 2)
    section = training_section(kind, {"lr": 1e-3, "steps": 1, "batch_size": 2})
    train_model(kind, base, data, out=tmp_path / "out", recipe=section, device="cpu")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / "model" / name).read_bytes() == (base / name).read_bytes()
    before, after = Tokenizer.load(base), Tokenizer.load(tmp_path / "out" / "model")
    for text in ("Hi", "\nHi <|im_start|>", ""):
        turns = [Message("user", text), Message("assistant", "Ho")]
        assert guess_format(before).render(turns, before) == guess_format(after).render(turns, after)
    if kind == "reward":
        scorer = load_scorer(tmp_path / "out" / "model", device="cpu")
        assert len(scorer.score([[Message("user", "Hi"), Message("assistant", "Ho")]])) == 1


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_another_format_than_the_folders_is_saved_with_the_model(base: Path, tmp_path: Path, name: str) -> None:
    data = rows_of(tmp_path / "rows.jsonl", [{"prompt": "Hi", "response": "Ho"}])
    section = training_section("sft", {"lr": 1e-3, "steps": 1, "batch_size": 1})
    train_model("sft", base, data, out=tmp_path / "out", recipe=section, device="cpu", chat_format=name)
    _, tokenizer = load_model(tmp_path / "out" / "model")
    wanted = PLAIN if name == "plain" else FORMATS[name].template
    assert tokenizer.chat_templates == {"default": wanted} and not (tmp_path / "out" / "model" / "chat_template.jinja").exists()
    turns = [Message("user", "\nHi"), Message("assistant", "\nHo")]
    assert guess_format(tokenizer).render(turns, tokenizer) == find_format(name, Tokenizer.load(base)).render(turns, Tokenizer.load(base))
    assert json.loads((tmp_path / "out" / "model" / "tokenizer_config.json").read_text())["model_max_length"] == 512


def test_rows_with_tools_are_rendered_where_the_template_takes_them(base: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(base)
    for tools in (TOOLS, json.dumps(TOOLS)):
        (row,) = read_demonstrations(rows_of(tmp_path / "rows.jsonl", [{"messages": CALLS, "tools": tools}]))
        (sample,) = demonstration_samples([row], guess_format(tokenizer), tokenizer)
        text = tokenizer.decode(sample.ids, keep_special=True)
        assert json.dumps(TOOLS) in text and 'assistant\nmill {"n": 1}<|im_end|>\n<|im_start|>tool\n3 sacks' in text
        for name in ("own.parquet", "own.jsonl"):  # a run's own files
            other = Demonstration("x", "general", (Message("user", "Hi"), Message("assistant", "Ho")), "human")
            write_rows(tmp_path / name, [row, other])
            assert read_rows(tmp_path / name, Demonstration) == [row, other]
        trained = [token for token, now in zip(sample.ids, sample.mask, strict=True) if now]
        assert tokenizer.decode(trained, keep_special=True) == 'mill {"n": 1}<|im_end|>Done.<|im_end|>'
        with pytest.raises(InputError, match=rf"conversation {row.id}: .*tool.* chatml has none"):
            demonstration_samples([row], FORMATS["chatml"], tokenizer)
    (row,) = read_demonstrations(rows_of(tmp_path / "rows.jsonl", [{"prompt": "Hi", "response": "Ho", "tools": TOOLS}]))
    with pytest.raises(InputError, match="there are tools"):
        demonstration_samples([row], FORMATS["chatml"], tokenizer)
    with pytest.raises(InputError, match="Row 1 .*`tools` is text that is no JSON"):
        read_demonstrations(rows_of(tmp_path / "rows.jsonl", [{"messages": CALLS, "tools": "mill"}]))
    broken = [CALLS[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    with pytest.raises(InputError, match="Row 1 .*turn 2 of `messages`: The arguments"):
        read_demonstrations(rows_of(tmp_path / "rows.jsonl", [{"messages": broken}]))
    with pytest.raises(InputError, match="Turn 2 .* role 'tool'"):
        read_demonstrations(rows_of(tmp_path / "rows.jsonl", [{"messages": [CALLS[0], CALLS[2], CALLS[3]]}]))
