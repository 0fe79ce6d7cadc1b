"""Evaluation of one model on prompts with known answers."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from gristmill.core.progress import Progress
from gristmill.data.chat import Message
from gristmill.data.human import HumanData
from gristmill.data.readers import read_prompts
from gristmill.engine.engine import Engine
from gristmill.engine.parity import divergence
from gristmill.evaluate.runner import evaluate_model
from gristmill.generation.api import Request, SamplingParams
from gristmill.judge.programs import Verifier, check_tests, is_code
from gristmill.miniature.source import MiniatureSource
from gristmill.sandbox.sandbox import Sandbox


def evaluate(
    engine: Engine, prompts_file: Path | None, progress: Progress, *, max_tokens: int, seed: int, unsafe_code: bool = False
) -> dict[str, Any]:
    """Greedy and sampled accuracy on a file's prompts with truths, or on the miniature world's."""
    prompts = MiniatureSource(HumanData(), seed).evaluation() if prompts_file is None else read_prompts(prompts_file, "human", truth=True)
    needs_code = any(is_code(p.truth) for p in prompts)

    def run(requests: list[Request]) -> dict[str, Any]:
        return {r.id: c for r, c in progress.track(engine.generate(requests), len(requests))}

    with Sandbox(unsafe=unsafe_code) if needs_code else nullcontext() as sandbox:
        if sandbox is not None and prompts_file is not None:
            check_tests(prompts, sandbox, quiet=progress.quiet)
        verifier = Verifier(sandbox)
        num_weak = 0

        def check(cases: list[tuple[dict[str, Any], str]]) -> list[bool]:
            nonlocal num_weak
            right = verifier.verify(cases)
            num_weak = verifier.num_weak(cases, right)
            return right

        scores = evaluate_model(prompts, run, check, max_tokens=max_tokens, seed=seed)
    if num_weak:
        scores["weak"] = num_weak
    if engine.quantize or engine.cache_dtype != engine.dtype:  # on what the model itself answers
        own = Engine(engine.model, engine.tokenizer, engine.chat_format, name=engine.name, max_batch=engine.max_batch)
        asked = [Request(str(i), p.messages, SamplingParams(temperature=0.0, max_tokens=max_tokens), seed) for i, p in enumerate(prompts)]
        said = [(*r.messages, Message("assistant", outs[0].text)) for r, outs in own.generate(asked) if outs[0].text.strip()]
        scores["quantized"] = divergence(engine, said)
    return scores
