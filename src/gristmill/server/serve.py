"""Server entry point, `gristmill serve`: a model folder behind an address, until interrupted."""

import asyncio
import gc
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from aiohttp import web

from gristmill.core.echo import echo
from gristmill.core.errors import InputError
from gristmill.core.io import read_bytes, reason
from gristmill.core.logs import limit_logs
from gristmill.core.response_text import REASONING_PARSERS
from gristmill.data.chat import Conversation
from gristmill.data.thinking import check_shown
from gristmill.engine.load import EngineArgs, load_engine
from gristmill.judge.reward import RewardScorer, load_scorer
from gristmill.model.adapters import check_model_folder, is_adapter
from gristmill.server.adapters import AdapterLoader, LoraArgs
from gristmill.server.admission import Limits
from gristmill.server.app import Server
from gristmill.server.connections import ACCEPT_BURST, ConnectionPool, connection_limit
from gristmill.server.ratings import RateFn
from gristmill.server.tools import form_of

BACKLOG = 4096  # where it is full, a client tries again only after a second
SHUTDOWN_SECONDS = 60.0  # that answers under way may take when the server is told to end


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """Server arguments: address, keys, limits and the reward model.

    Attributes:
        reward: folder of a reward model that is served too.
        api_key_env, api_key_file: where the keys are that requests must bear, one a line; neither: everybody may ask.
        max_open_samples: under way or waiting, beyond which requests are sent away for a while.
        timeout: seconds a request may take.
        reasoning_parser: how thinking is told apart from the content of chat answers; "": not at all.
        tool_call_parser: how the model writes calls of tools; "": as its chat template does.
        enable_auto_tool_choice: start only if calls can be told from text.
        lora: adapters that are served beside the model.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    reward: Path | None = None
    api_key_env: str = ""
    api_key_file: Path | None = None
    max_open_samples: int = 4096
    timeout: float = 600.0
    reasoning_parser: str = ""
    tool_call_parser: str = ""
    enable_auto_tool_choice: bool = False
    lora: LoraArgs = field(default_factory=LoraArgs)


def serve(model_folder: Path, args: ServerArgs, engine_args: EngineArgs) -> None:
    """Serve a model until interrupted. Prints the address when it is ready.

    Raises:
        InputError: a folder is no model, a key is missing, or the address cannot be used.
    """
    if args.max_open_samples < 1 or not args.timeout > 0 or (engine_args.cache_tokens is not None and engine_args.cache_tokens < 1):
        raise InputError("--max-open-samples and --cache-tokens must be at least 1, and --timeout above 0.")
    args.lora.check()
    if args.lora.enable and is_adapter(model_folder):
        raise InputError(f"Serve the base of {model_folder}, and the adapter with --lora-modules NAME={model_folder}.")
    keys = _keys(args.api_key_env, args.api_key_file)
    if args.tool_call_parser:
        form_of(args.tool_call_parser)
    if args.reasoning_parser not in ("", *REASONING_PARSERS):
        raise InputError(f"--reasoning-parser {args.reasoning_parser} is not one of {', '.join(REASONING_PARSERS)}.")
    if args.reward is not None:
        check_model_folder(args.reward)
    name = args.name or model_folder.resolve().name
    engine = load_engine(model_folder, replace(engine_args, max_loras=args.lora.max_loras), name=name)
    if args.reasoning_parser:
        check_shown(engine.tokenizer, model_folder, "leave --reasoning-parser out")
    loader = AdapterLoader(engine, model_folder, args.lora)
    loader.start()
    how = {"device": engine_args.device, "dtype": engine_args.dtype}
    scorer = load_scorer(args.reward, engine_args.chat_format, **how) if args.reward is not None else None
    reward_name = args.reward.resolve().name if args.reward is not None else ""
    if reward_name in (name, *engine.adapters):
        reward_name += "-reward"
    server = Server(
        engine,
        Limits(keys, args.max_open_samples, args.timeout),
        _rate_fn(scorer) if scorer is not None else None,
        reward_name=reward_name,
        reward_context=scorer.model.backbone.config.max_positions if scorer is not None else None,
        reasoning_parser=args.reasoning_parser,
        tool_call_parser=args.tool_call_parser,
        adapters=loader if args.lora.may_change else None,
    )
    support = server.tool_support
    if args.enable_auto_tool_choice and not (support.takes_tools and support.form):
        unknown = "the form of calls is not known: name it with --tool-call-parser"
        why = unknown if support.takes_tools else "there is no place for tools: serve another model"
        raise InputError(f"{model_folder} cannot call tools, since in its chat template {why}, or leave --enable-auto-tool-choice out.")
    try:
        listening = socket.create_server((args.host, args.port))
    except (OSError, OverflowError) as e:
        reason = getattr(e, "strerror", None) or e
        raise InputError(f"Nothing can listen at {args.host}:{args.port} ({reason}): choose another --host or --port.") from e

    def ready() -> None:
        both = f"{name} and the reward model {reward_name} answer" if scorer is not None else f"{name} answers"
        echo(f"{both} at http://{args.host}:{listening.getsockname()[1]}/v1")
        if support.takes_tools:
            echo(f"calls of tools: {support.name}", err=True)
        runner = server.async_engine.workers[0].core.model_runner
        echo(f"attention: {runner.attention.name}", err=True)
        if engine.speculative is not None:
            eager = "; a step that verifies one is not replayed as a CUDA graph" if engine.device.type == "cuda" else ""
            echo(f"drafts: n-gram look-up, {engine.speculative.num_speculative_tokens} tokens at most{eager}", err=True)

    limit_logs()
    # What is loaded by now stays: a collection of garbage, which stops all answers meanwhile, need not look through it.
    gc.collect()
    gc.freeze()
    asyncio.run(_listen(server, listening, ready))
    if not server.quiet:  # in the middle of a long step; torch's threads would not end quietly
        os._exit(0)


async def _listen(server: Server, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Answer connections until SIGINT or SIGTERM, and then those requests that are under way."""
    loop = asyncio.get_running_loop()
    end = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end.set)
    runner = web.AppRunner(server.app(), access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        assert runner.server is not None
        server.pool = ConnectionPool(runner.server, connection_limit())
        listener = await loop.create_server(server.pool, sock=listening, backlog=ACCEPT_BURST)
        listening.listen(BACKLOG)  # the kernel may keep more waiting than asyncio accepts at once
        ready()
        await end.wait()
        listener.close()
        server.pool.stop()
    finally:
        await runner.cleanup()


def _keys(variable: str, file: Path | None) -> list[str]:
    """API keys of an environment variable and a file."""
    keys = os.environ.get(variable, "").split() if variable else []
    if file is not None:
        try:
            keys += read_bytes(file).decode().split()
        except ValueError as e:
            raise InputError(f"The key file {file} cannot be read ({reason(e)}).") from e
    if (variable or file is not None) and not keys:
        raise InputError(f"There is no API key in {variable or file}: write one there, or leave the option out to let everybody ask.")
    return keys


def _rate_fn(scorer: RewardScorer) -> RateFn:
    """Rating function of a reward model."""

    def rate(conversations: list[Conversation]) -> list[dict[str, float]]:
        return [asdict(rating) | {"score": scorer.total(rating)} for rating in scorer.score(conversations)]

    return rate
