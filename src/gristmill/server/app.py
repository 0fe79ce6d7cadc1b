"""OpenAI-compatible server: chat and text completions, streamed or whole, beside a reward model if there is one.

Sources of the protocol: OpenAI's API reference; for rewards, the API of Nemotron-4-340B-Reward.
"""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from aiohttp import web
from prometheus_client import generate_latest

from gristmill.core.errors import InputError
from gristmill.core.response_text import REASONING_PARSERS, ReasoningParser, has_open_thinking
from gristmill.data.chat import Conversation, check_turns
from gristmill.data.rows import make_id
from gristmill.engine.async_engine import AsyncEngine
from gristmill.engine.block_manager import BLOCK_SIZE
from gristmill.engine.engine import Engine
from gristmill.generation.api import Request, SamplingParams
from gristmill.server.adapters import AdapterLoader
from gristmill.server.admission import Admission, HttpError, Limits
from gristmill.server.connections import Connection, ConnectionPool
from gristmill.server.delivery import MAX_INLINE_WORK, Delivery, in_thread
from gristmill.server.metrics import Metrics
from gristmill.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    CompletionRequestBase,
    FieldError,
    LoadAdapterRequest,
    RequestBody,
    RewardRequest,
    TemplateChatRequest,
    UnloadAdapterRequest,
    is_small,
    parse_body,
    parse_messages,
    parse_prompts,
    shown,
)
from gristmill.server.ratings import RateFn, RatingQueue
from gristmill.server.responses import (
    ChatResponseBuilder,
    CompletionResponseBuilder,
    envelope,
    usage_counts,
)
from gristmill.server.responses_api import ResponsesBuilder, ResponsesRequest
from gristmill.server.tools import ToolUse, find_support, use_tools

MAX_TOKEN_CHARS = 128  # as good as never more: a longer text is too long without counting
MAX_GRAMMAR_WAIT = 15.0  # seconds
PROMPT_TAIL = 16  # tokens of a prompt that may begin the answer's thinking, or end it
MAX_NAMES = 20  # of adapters, that an error tells
Body = TypeVar("Body", bound=RequestBody)


class Server:
    """HTTP server over an asynchronous engine.

    Args:
        rate: the attributes of the last turn of conversations, by the reward model `reward_name`.
        reward_context: tokens that it reads at most; None: as many as the engine's model.
        reasoning_parser: a name of REASONING_PARSERS: thinking is told apart from the content of chat answers.
        tool_call_parser: a name of `tool_parser.FORMS`: how the model writes calls of tools; "": as its chat template does.
        adapters: loads LoRA adapters when a request asks for it, where that is allowed.

    Attributes:
        pool: the connections, where their number is limited.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits | None = None,
        rate: RateFn | None = None,
        *,
        reward_name: str = "reward",
        reward_context: int | None = None,
        reasoning_parser: str = "",
        tool_call_parser: str = "",
        adapters: AdapterLoader | None = None,
    ):
        self.engine, self.reward_name = engine, reward_name
        self.reasoning_parser = reasoning_parser
        self.tool_support = find_support(engine.chat_format, engine.tokenizer, tool_call_parser)
        self.context = engine.model.config.max_positions
        self.reward_context = self.context if reward_context is None else reward_context
        self.async_engine = AsyncEngine(engine, lambda events: self.delivery.deliver(events), interactive=True)
        self.cache_tokens = min(worker.core.block_manager.num_blocks for worker in self.async_engine.workers) * BLOCK_SIZE
        self.adapters = adapters
        self.pool: ConnectionPool | None = None
        self.metrics = Metrics(self.async_engine, lambda: self.pool)
        self.closing = False
        self._number = 0
        self._scorer = ThreadPoolExecutor(1)  # scores and ratings, one at a time
        self._grammars = ThreadPoolExecutor(1)  # so that grammars that take long wait for each other, and nobody for them
        self._helpers = ThreadPoolExecutor(2)  # parses, encodes and writes what is long
        self.admission = Admission(limits or Limits(), self.async_engine, self.metrics)
        self.delivery = Delivery(engine, self.async_engine, self.admission, helpers=self._helpers)
        self.ratings = RatingQueue(rate, self._scorer) if rate is not None else None

    def app(self) -> web.Application:
        """Application with its routes; the engine's threads start and stop with it."""
        expect = self.admission.expect
        app = web.Application(middlewares=[self.admission.middleware])
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._show_metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat, expect_handler=expect)
        app.router.add_get("/v1/models/{name:.+}", self._model)
        app.router.add_post("/v1/responses", self._responses, expect_handler=expect)
        app.router.add_post("/v1/embeddings", self._embeddings, expect_handler=expect)
        app.router.add_post("/v1/completions", self._completions, expect_handler=expect)
        app.router.add_post("/v1/rewards", self._rewards, expect_handler=expect)
        if self.adapters is not None:
            app.router.add_post("/v1/load_lora_adapter", self._load_adapter, expect_handler=expect)
            app.router.add_post("/v1/unload_lora_adapter", self._unload_adapter, expect_handler=expect)

        async def start(app: web.Application) -> None:
            self.delivery.start()

        async def shut(app: web.Application) -> None:
            self.closing = True

        async def stop(app: web.Application) -> None:
            self.quiet = self.async_engine.stop()
            for executor in (self._scorer, self._grammars, self._helpers):
                executor.shutdown(wait=False, cancel_futures=True)

        app.on_startup.append(start)
        app.on_shutdown.append(shut)
        app.on_cleanup.append(stop)
        return app

    # ---- the one way in of all routes ----

    async def _admit(self, http: web.Request, schema: type[Body]) -> tuple[Body, bool]:
        """Read and parse a body, and say whether it is long: what is done with it then belongs into a thread."""
        self.admission.check_capacity(1)
        raw = await self.admission.read_body(http)
        if isinstance(http.protocol, Connection):
            http.protocol.work(self.admission.limits.timeout)
        long = len(raw) > MAX_INLINE_WORK
        body = await self.delivery.run(parse_body, raw, schema, long=long and not is_small(raw))
        if body.model is None and isinstance(body, CompletionRequestBase | ResponsesRequest):  # as vLLM and llama.cpp take it
            body.model = self.engine.name
        return body, long

    # ---- routes ----

    async def _health(self, _: web.Request) -> web.Response:
        good = self.async_engine.healthy and not self.closing
        return web.json_response({"status": "ok" if good else "closing" if self.closing else "broken"}, status=200 if good else 503)

    async def _show_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self.metrics.registry), content_type="text/plain", charset="utf-8")

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": self._model_list()})

    async def _model(self, http: web.Request) -> web.Response:
        name = http.match_info["name"]
        models = {model["id"]: model for model in self._model_list()}
        self._check_model(name, *models)
        return web.json_response(models[name])

    async def _embeddings(self, _: web.Request) -> web.Response:
        raise HttpError(404, "this server makes no embeddings: its models write text; ask one that serves an embedding model")

    def _model_list(self) -> list[dict[str, Any]]:
        names = [self.engine.name, *([self.reward_name] if self.ratings else [])]
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "gristmill"} for name in names]
        return models + [{**models[0], "id": name, "parent": self.engine.name} for name in list(self.engine.adapters)]

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        in_process = self.engine.chat_format.in_process  # no template of the folder's
        body, long = await self._admit(http, ChatCompletionRequest if in_process else TemplateChatRequest)
        if self.ratings is not None and body.model == self.reward_name:
            return await self._reward_chat(body, long=long)
        self._check_model(body.model, self.engine.name, *self.engine.adapters)
        self.admission.check_capacity(1 if body.n is None else body.n)
        own = body if isinstance(body, TemplateChatRequest) else None
        tools = use_tools(self.tool_support, own.tools or [], own.tool_choice, parallel=own.parallel_tool_calls) if own else None
        request, reasoning = await self._chat_request(body, tools, long=long)
        builder = ChatResponseBuilder(
            self.engine, bool(body.logprobs), reasoning, model=body.model or "", continued=request.continues_text, tools=tools
        )
        return await self.delivery.respond(http, body, [request], builder=builder)

    async def _responses(self, http: web.Request) -> web.StreamResponse:
        asked, long = await self._admit(http, ResponsesRequest)
        self._check_model(asked.model, self.engine.name, *self.engine.adapters)
        body = await self.delivery.run(lambda: asked.to_chat(template=not self.engine.chat_format.in_process), long=long)
        parallel = asked.parallel_tool_calls
        tools = use_tools(self.tool_support, asked.tools or [], asked.tool_choice, parallel=parallel, flat=True)
        request, reasoning = await self._chat_request(body, tools, long=long)
        model, continued = body.model or "", request.continues_text
        chat = ChatResponseBuilder(self.engine, asked.told_logprobs, reasoning, model=model, continued=continued, tools=tools)
        return await self.delivery.respond(http, body, [request], builder=ResponsesBuilder(asked, chat))

    async def _chat_request(
        self, body: ChatCompletionRequest, tools: ToolUse | None, *, long: bool
    ) -> tuple[Request, Callable[[], ReasoningParser] | None]:
        """Request of a chat's next turn, and what tells the thinking of its answers apart."""
        conversation, prompt_ids = await self.delivery.run(self._render, body, long=long or not self.engine.chat_format.in_process)
        room = self._room(len(prompt_ids))
        if tools is not None and body.continue_final_message:
            content = conversation[-1].content
            if self.reasoning_parser:
                _, content = ReasoningParser(REASONING_PARSERS[self.reasoning_parser]).add(content, last=True)
            tools.begun = content
        sampling = await self._sampling(body, room, (body.top_logprobs or 0) if body.logprobs else 0, tools=tools)
        request = self._request("chatcmpl", body, conversation, prompt_ids, sampling=sampling, content=body.messages)
        return request, self._reasoning_parser(body, conversation, prompt_ids, sampling, tools)

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        body, long = await self._admit(http, CompletionRequest)
        self._check_model(body.model, self.engine.name, *self.engine.adapters)
        texts = await self.delivery.run(parse_prompts, body.prompt, long=long)
        self.admission.check_capacity(len(texts) * (1 if body.n is None else body.n))
        prompts = await self.delivery.run(lambda: [self._tokenize(one) for one in texts], long=long)
        wanted = 16 if body.max_tokens is None else body.max_tokens
        scoring = body.echo and body.logprobs is not None
        score = functools.partial(self.engine.prompt_logprobs, top=body.logprobs or 0, adapter=self._adapter(body))
        scored = [await in_thread(self._scorer, score, ids) for ids in prompts] if scoring else None
        if body.echo and wanted == 0:
            sampling, requests = await self._sampling(body.model_copy(update={"max_tokens": 1}), 16, 0), []
        else:
            sampling = await self._sampling(body, 16, body.logprobs or 0)
            requests = await self.delivery.run(
                lambda: [self._request("cmpl", body, (), ids, sampling=sampling, content=[texts[i], i]) for i, ids in enumerate(prompts)],
                long=long,
            )
        builder = CompletionResponseBuilder(self.engine, body, prompts, scored=scored, model=body.model or "")
        if not requests and not body.stream:
            size = sum(map(len, prompts)) * sampling.n * (1 + (body.logprobs or 0))
            return await self.delivery.whole(builder, [], sampling.n, long=size > MAX_INLINE_WORK)
        return await self.delivery.respond(http, body, requests, builder=builder)

    async def _rewards(self, http: web.Request) -> web.StreamResponse:
        body, long = await self._admit(http, RewardRequest)
        if self.ratings is None:
            raise HttpError(404, "this server has no reward model: start it with --reward")
        if body.model:
            self._check_model(body.model, self.reward_name)
        rating = await self._rating(body.messages, long=long)
        return web.json_response({"object": "reward", "model": self.reward_name, "rewards": rating})

    async def _load_adapter(self, http: web.Request) -> web.StreamResponse:
        body, _ = await self._admit(http, LoadAdapterRequest)
        assert self.adapters is not None
        if body.lora_name == self.reward_name and self.ratings is not None:
            raise FieldError("lora_name", "the reward model has this name: choose another")
        await in_thread(self._grammars, self.adapters.load, body.lora_name, body.lora_path)  # one at a time
        return web.Response(text=f"Success: LoRA adapter '{shown(body.lora_name)}' added successfully.")

    async def _unload_adapter(self, http: web.Request) -> web.StreamResponse:
        body, _ = await self._admit(http, UnloadAdapterRequest)
        if body.lora_name not in self.engine.adapters:
            raise HttpError(404, f"there is no LoRA adapter '{shown(body.lora_name)}' to unload", code="model_not_found")
        self.engine.remove_adapter(body.lora_name)
        return web.Response(text=f"Success: LoRA adapter '{shown(body.lora_name)}' removed successfully.")

    async def _reward_chat(self, body: ChatCompletionRequest, *, long: bool) -> web.StreamResponse:
        if body.stream or (body.n or 1) > 1:
            raise InputError("a reward model gives one rating, whole: leave stream and n out")
        rating = {name: value for name, value in (await self._rating(body.messages, long=long)).items() if name != "score"}
        text = ",".join(f"{name}:{value}" for name, value in rating.items())
        entries: list[dict[str, Any]] = [
            {"token": name, "logprob": value, "bytes": None, "top_logprobs": []} for name, value in rating.items()
        ]
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": {"content": entries}, "finish_reason": "length"}
        return web.json_response(
            envelope("chat.completion", f"reward-{make_id(text)}", self.reward_name, choices=[choice], usage=usage_counts(0, 1))
        )

    # ---- work ----

    def _conversation(self, messages: list[Any], context: int, tools: bool = False) -> Conversation:
        """Messages of a body, unless they are more than a context of so many tokens could ever hold."""
        conversation = parse_messages(messages, context, tools=tools)
        _check_length(sum(len(message.content) + len(message.fields) for message in conversation), context)
        return conversation

    def _render(self, body: ChatCompletionRequest) -> tuple[Conversation, list[int]]:
        own = body if isinstance(body, TemplateChatRequest) else None
        conversation = self._conversation(body.messages, self.context, own is not None)
        if body.continue_final_message and conversation[-1].role != "assistant":
            raise FieldError("continue_final_message", "only an assistant's message can go on, and the last one is none")
        begin, go_on = body.add_generation_prompt is not False, bool(body.continue_final_message)
        return conversation, self.engine.chat_format.render_turns(
            conversation,
            self.engine.tokenizer,
            add_generation_prompt=begin,
            continue_final_message=go_on,
            tools=(own.tools or ()) if own else (),
            variables=body.chat_template_kwargs,
        )

    def _reasoning_parser(
        self,
        body: ChatCompletionRequest,
        conversation: Conversation,
        prompt_ids: list[int],
        sampling: SamplingParams,
        tools: ToolUse | None = None,
    ) -> Callable[[], ReasoningParser] | None:
        """Reasoning parsers of an answer's samples. What keeps to a grammar from its first token on does not think."""
        if not self.reasoning_parser:
            return None
        begun: bool | None = False
        free = not sampling.grammar or (tools is not None and tools.lets_think)
        if free and body.continue_final_message:
            begun = has_open_thinking(conversation[-1].content[-MAX_INLINE_WORK:])
        elif free:
            begun = has_open_thinking(self.engine.tokenizer.decode(prompt_ids[-PROMPT_TAIL:], keep_special=True), at_end=True)
        return partial(ReasoningParser, REASONING_PARSERS[self.reasoning_parser] if begun is None else begun)

    def _tokenize(self, prompt: str | list[int]) -> list[int]:
        ids = prompt
        if isinstance(ids, str):
            _check_length(len(ids), self.context)
            ids = self.engine.tokenizer.encode(ids)
        if not ids:
            raise FieldError("prompt", "a prompt is empty")
        if len(ids) > self.context:
            raise FieldError("prompt", f"a prompt has {len(ids):,} tokens and the model's context is {self.context}: shorten it")
        if wrong := [token for token in ids if not 0 <= token < self.engine.model.config.vocab_size]:
            raise FieldError("prompt", f"the model has no token {wrong[0] if abs(wrong[0]) < 1 << 64 else 'of such a number'}")
        return ids

    def _room(self, num_prompt_tokens: int) -> int:
        """Tokens that an answer has, where its request does not say: the rest of the context, or of the cache if that is less."""
        return max(1, min(self.context, self.cache_tokens) - num_prompt_tokens)

    async def _sampling(
        self, body: CompletionRequestBase, default_tokens: int, top_logprobs: int, *, tools: ToolUse | None = None
    ) -> SamplingParams:
        """Sampling parameters, with a grammar that is built and found good where one is asked for."""
        grammar = ""
        if body.response_format is not None or body.structured_outputs is not None or tools is not None:

            def build() -> str:
                made, validate = body.to_grammar(), self.engine.grammar_backend.validate
                if tools is not None:
                    return tools.build_grammar(made, self.engine.tokenizer, validate, set(self.engine.stop_V.nonzero()[0].tolist()))
                if made:
                    validate(made)
                return made

            try:
                grammar = await asyncio.wait_for(in_thread(self._grammars, build), MAX_GRAMMAR_WAIT)
            except TimeoutError as e:
                raise HttpError(503, f"the grammar was not built within {MAX_GRAMMAR_WAIT:g} s: make it simpler, or come back later") from e
        return body.to_sampling_params(default_tokens, self.context, top_logprobs=top_logprobs, grammar=grammar)

    async def _rating(self, messages: list[Any], *, long: bool) -> dict[str, float]:
        assert self.ratings is not None
        conversation = await self.delivery.run(self._conversation, messages, self.reward_context, long=long)
        check_turns(conversation)
        if conversation[-1].role != "assistant":
            raise FieldError("messages", "the last message must be the assistant's, which is rated")
        return await self.ratings.rate(conversation)

    def _adapter(self, body: CompletionRequestBase) -> str:
        """Name of the adapter that a request names as its model; "" for the model itself."""
        return "" if body.model in (None, self.engine.name) else str(body.model)

    def _check_model(self, name: str | None, *known: str) -> None:
        if name not in known:
            adapters = ", ".join(map(repr, list(self.engine.adapters)[:MAX_NAMES]))
            also = f", adapters {adapters}" if adapters else ""
            also += f", and the reward model {self.reward_name!r}" if self.ratings else ""
            words = f"the model '{shown(name or '')}' does not exist here; this server has {self.engine.name!r}{also}"
            raise HttpError(404, words, code="model_not_found")

    def _request(
        self,
        kind: str,
        body: CompletionRequestBase,
        conversation: Conversation,
        prompt_ids: list[int],
        *,
        sampling: SamplingParams,
        content: Any,
    ) -> Request:
        self._number += 1
        # the engine samples by id and seed: where a seed is given, equal requests shall have equal answers
        name = f"{kind}-{self._number}" if body.seed is None else f"{kind}-{make_id(content, body.seed)}"
        priority = -(body.priority or 0)  # vLLM's way round: the lower goes first
        return Request(name, conversation, sampling, body.seed or 0, priority, tuple(prompt_ids), self._adapter(body))


def _check_length(num_chars: int, context: int) -> None:
    if num_chars > MAX_TOKEN_CHARS * context:
        raise InputError(f"the text has {num_chars:,} characters and the model's context is {context} tokens: shorten it")
