"""Steps of a dataset run, and of each round of the alignment loop: prompts, answers, judgements, rows to train on."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gristmill.data.chat import Message
from gristmill.data.rows import Prompt, Refused, Response, TopicRow
from gristmill.generation.api import SamplingParams
from gristmill.judge.programs import Tick, Verifier, check_tests, is_code
from gristmill.runs import artifacts
from gristmill.sandbox.sandbox import Sandbox
from gristmill.synth.dedup import NearDuplicates
from gristmill.synth.parsing import normalize
from gristmill.synth.writer import Writer

PROMPT_FILES: list[artifacts.AnyArtifact] = [
    artifacts.PROMPTS,
    artifacts.CONVERSATIONS,
    artifacts.REFUSED,
    artifacts.TOPICS,
    artifacts.CALLS,
]
ANSWER_FILES: list[artifacts.AnyArtifact] = [artifacts.RESPONSES, artifacts.CALLS]
KEPT_FILES: list[artifacts.AnyArtifact] = [artifacts.RESPONSES, artifacts.KEPT]
PAIR_FILES: list[artifacts.AnyArtifact] = [artifacts.RESPONSES, artifacts.PAIRS]

RequestId = Callable[[Prompt, SamplingParams], str]


def write_topics(folder: Path, writer: Writer) -> None:
    """Keep the topics that a stage's prompts grew from."""
    artifacts.TOPICS.write(folder, [TopicRow(t.id, t.text, t.origin) for t in writer.topics.values()])


def distinct(prompts: Iterable[Prompt], similarity: float) -> tuple[list[Prompt], list[Refused]]:
    """Prompts that no earlier one of their task equals or, below a similarity of 1, nearly equals; and those left out."""
    seen: dict[str, NearDuplicates] = defaultdict(lambda: NearDuplicates(similarity))
    exact: set[tuple[str, str]] = set()
    kept, refused = [], []
    for prompt in prompts:
        words = "\n".join(m.content for m in prompt.messages if m.role != "assistant")
        key = (prompt.task, normalize(words))
        if key in exact or (similarity < 1 and not seen[prompt.task].add(words)):
            refused.append(Refused(prompt.id, prompt.task, prompt.messages[-1].content, "too much alike"))
            continue
        exact.add(key)
        kept.append(prompt)
    return kept, refused


async def answer_prompts(
    writer: Writer,
    prompts: Sequence[Prompt],
    samplings: Sequence[SamplingParams],
    *,
    request_id: RequestId | None = None,
    strip: bool = True,
) -> list[Response]:
    """Answers to every prompt, several at each temperature, in the prompts' order.

    Args:
        request_id: names the call of a prompt and a temperature, which decides what is drawn; None: a hash of all that is asked.
        strip: take the space around answers away.
    """

    async def answer(entry: tuple[Prompt, int, SamplingParams]) -> list[Response]:
        prompt, index, sampling = entry
        name = request_id(prompt, sampling) if request_id else ""
        salt = f"response {prompt.id} {index}"
        replies = await writer.answers(prompt.messages, "answer", [prompt.id], salt=salt, sampling=sampling, name=name, strip=strip)
        return [
            Response(
                f"{reply.id}#{number}",
                prompt.id,
                prompt.task,
                prompt.messages,
                reply.text,
                reply.model,
                sampling.temperature,
                number,
                reply.num_tokens,
                reply.logprob,
                reply.finished,
            )
            for number, reply in enumerate(replies)
        ]

    asked = [(prompt, index, sampling) for prompt in prompts for index, sampling in enumerate(samplings)]
    return await writer.all(asked, answer, max(1, min(len(asked), 2 * writer.client.source.concurrency)))


def conversation_of(r: Response) -> tuple[Message, ...]:
    """An answer with the conversation that it answers."""
    return (*r.messages, Message("assistant", r.text))


def open_verifier(stack: ExitStack, *, needs_code: bool, unsafe_code: bool, tick: Tick | None = None) -> Verifier:
    """A verifier, as long as the stack is open; with a sandbox where an answer may be a program.

    Raises:
        InputError: the kernel offers no jail.
    """
    sandbox: Any = stack.enter_context(Sandbox(unsafe=unsafe_code)) if needs_code else None
    return Verifier(sandbox, tick)


def check_given_tests(prompts: Sequence[Prompt], *, unsafe_code: bool, quiet: bool = False) -> None:
    """Run the tests of a user's prompts before any answer to them is paid for.

    Raises:
        InputError: some pass any program or fail their reference, or the kernel offers no jail.
    """
    if any(is_code(p.truth) for p in prompts):
        with Sandbox(unsafe=unsafe_code) as sandbox:
            check_tests(prompts, sandbox, quiet=quiet)
