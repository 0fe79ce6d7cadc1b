"""Thinking on the server: as reasoning content, whole and streamed, and within a budget."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gristmill.data.chat import Message
from gristmill.data.chat_format import FORMATS
from gristmill.data.rows import Demonstration
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.hf_save import save_model
from gristmill.model.transformer import Transformer
from gristmill.server.admission import Limits
from gristmill.server.app import Server
from gristmill.train.objectives.sft import demonstration_samples, sft_objective
from gristmill.train.trainer import Trainer, TrainSettings
from tests.server.test_app import chunks, served_here


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model that knows one answer, with thinking before it."""
    chat_format, talk = FORMATS["nemotron"], (Message("user", "Sum?"), Message("assistant", "<think>2+2</think>\n\n4"))
    tokenizer = Tokenizer.train(["System\nUser\nAssistant\n"], 300, chat_format.special_tokens)
    model = Transformer(ModelConfig("nemotron", tokenizer.vocab_size, 32, uniform_blocks(2, 2, 1, 16, 64), max_positions=128))
    model.init_weights(0)
    settings = TrainSettings(optimizer="muon", lr=1e-2, muon_lr=0.05, steps=80, batch_size=4, schedule="linear", warmup_steps=5)
    rows = [Demonstration(f"row-{i}", "", talk, "human") for i in range(4)]
    Trainer(model, sft_objective, settings).fit(demonstration_samples(rows, chat_format, tokenizer))
    folder = tmp_path_factory.mktemp("thinker") / "model"
    save_model(model, tokenizer, folder)
    return folder


@pytest.mark.parametrize(
    ("parser", "extra", "thought", "said"),
    [
        ("think", {}, "2+2", "\n\n4"),
        ("deepseek_r1", {}, "2+2", "\n\n4"),
        ("think", {"max_tokens": 9}, "2+", None),
        ("", {}, None, "<think>2+2</think>\n\n4"),
        ("think", {"begun": "<think>2"}, "+2", "\n\n4"),
        ("deepseek_r1", {"begun": "<think>2+2</think>"}, None, "\n\n4"),
        ("qwen3", {"structured_outputs": {"choice": ["<think>5</think>"]}}, None, "<think>5</think>"),
    ],
)
def test_thinking_comes_as_reasoning_content(thinker: Path, parser: str, extra: dict[str, Any], thought: str, said: str) -> None:
    extra = dict(extra)
    talk = [{"role": "user", "content": "Sum?"}]
    if "begun" in extra:
        talk.append({"role": "assistant", "content": extra.pop("begun")})
        extra["continue_final_message"] = True
    ask = {"model": "Tiny", "messages": talk, "temperature": 0, "max_tokens": 40, "logprobs": True} | extra

    async def work(server: Server, session: aiohttp.ClientSession) -> None:
        async with session.post("/v1/chat/completions", json=ask) as reply:
            choice = (await reply.json())["choices"][0]
        message = choice["message"]
        assert message["content"] == said and message.get("reasoning_content") == message.get("reasoning") == thought
        assert ("reasoning_content" in message) == bool(parser)
        async with session.post("/v1/chat/completions", json=ask | {"stream": True, "n": 2}) as reply:
            streamed = [c for part in chunks(await reply.read()) for c in part["choices"]]
        for index in range(2):
            mine = [c for c in streamed if c["index"] == index]
            deltas = [c["delta"] for c in mine]
            assert "".join(d.get("content", "") for d in deltas) == (said or "")
            assert (
                "".join(d.get("reasoning_content", "") for d in deltas)
                == "".join(d.get("reasoning", "") for d in deltas)
                == (thought or "")
            )
            assert deltas[0]["role"] == "assistant" and mine[-1]["finish_reason"] == choice["finish_reason"]
            assert [e["token"] for c in mine for e in c["logprobs"]["content"]] == [e["token"] for e in choice["logprobs"]["content"]]
        history = [*talk, message | {"role": "assistant"}, {"role": "user", "content": "Sum?"}]
        async with session.post("/v1/chat/completions", json={"model": "Tiny", "messages": history, "max_tokens": 1}) as reply:
            assert reply.status == 200 or message["content"] is None, "an answer can be sent back as it came"

    asyncio.run(served_here(thinker, Limits(), None, work, reasoning_parser=parser))


def test_a_thinking_budget_and_the_tokens_of_thinking(thinker: Path) -> None:
    ask = {"model": "Tiny", "messages": [{"role": "user", "content": "Sum?"}], "temperature": 0, "max_tokens": 40}

    async def work(server: Server, session: aiohttp.ClientSession) -> None:
        for limit, thought in ((None, "2+2"), (1, "2"), (0, None)):
            limited = ask | ({} if limit is None else {"max_thinking_tokens": limit})
            async with session.post("/v1/chat/completions", json=limited) as reply:
                found = await reply.json()
            assert found["choices"][0]["message"]["reasoning_content"] == thought
            num = found["usage"]["completion_tokens_details"]["reasoning_tokens"]
            assert num == len(server.engine.tokenizer.encode(thought or ""))
            streamed = limited | {"stream": True, "stream_options": {"include_usage": True}}
            async with session.post("/v1/chat/completions", json=streamed) as reply:
                parts = chunks(await reply.read())
            told = [c["delta"].get("reasoning_content") for part in parts for c in part["choices"]]
            assert "".join(filter(None, told)) == (thought or "") and parts[-1]["usage"] == found["usage"]
        async with session.post(
            "/v1/responses", json={"model": "Tiny", "input": "Sum?", "temperature": 0, "max_thinking_tokens": 1}
        ) as reply:
            first = (await reply.json())["output"][0]
        assert first["type"] == "reasoning" and first["content"][0]["text"] == "2"
        async with session.post("/v1/chat/completions", json=ask | {"enable_thinking": True}) as reply:
            assert reply.status == 400 and "has no 'enable_thinking'" in (await reply.json())["error"]["message"]

    asyncio.run(served_here(thinker, Limits(), None, work, reasoning_parser="think"))
