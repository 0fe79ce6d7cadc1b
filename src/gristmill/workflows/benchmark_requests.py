"""What benchmarks ask: documents to requests, and whether a model can be asked them, before work is spent."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gristmill.core.errors import InputError
from gristmill.data.rows import make_id
from gristmill.data.tokenizer import Tokenizer
from gristmill.evaluate.documents import TaskData, read_task
from gristmill.evaluate.harness import Item, Prompter
from gristmill.evaluate.task import FEWSHOT_SEED, Task, find_tasks
from gristmill.workflows.benchmark_sources import Chat, encode_texts, room_for_prompt

NUM_LOOKED_AT = 4  # of a task's shortest contexts, whether its shots fit


@dataclass(frozen=True, kw_only=True)
class BenchmarkArgs:
    """Which benchmarks are run, and how.

    Attributes:
        data: folder with a folder for each task.
        num_fewshot: shots of a document; None: as many as each task says.
        limit: the first so many documents of each task (of each subset) alone.
        seed: of what draws shots.
        chat: generated answers are asked for as a message, in the model's chat format.
        thinking, max_thinking_tokens: as of `Chat`, which either of them asks for.
        out: folder for answers, samples and results; with it a killed evaluation goes on where it was.
        against: such a folder of another model, compared with in pairs.
        subsets: of tasks that have some, the only ones; none: all.
        contamination: folder of a run, or a file of rows, whose texts test items are looked for in.
    """

    tasks: tuple[str, ...]
    data: Path
    num_fewshot: int | None = None
    limit: int | None = None
    seed: int = FEWSHOT_SEED
    chat: bool = False
    thinking: Literal["", "on", "off"] = ""
    max_thinking_tokens: int | None = None
    out: Path | None = None
    against: Path | None = None
    contamination: Path | None = None
    unsafe_code: bool = False
    subsets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit must be at least 1, got {self.limit}.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise InputError(f"--num-fewshot must be 0 or more, got {self.num_fewshot}.")
        if self.thinking == "on" and self.max_thinking_tokens is None:
            raise InputError("Give --max-thinking-tokens with --thinking on: a task's answers are short, and thinking would use them up.")

    @property
    def asking(self) -> Chat | None:
        """How generated answers are asked for; None: as plain text."""
        as_chat = self.chat or self.thinking or self.max_thinking_tokens is not None
        return Chat(self.thinking, self.max_thinking_tokens) if as_chat else None


@dataclass
class Part:
    """A task, or a subset of one, with its items."""

    data: TaskData
    num_fewshot: int
    items: list[Item]

    @property
    def task(self) -> Task:
        return self.data.task

    @property
    def name(self) -> str:
        return self.data.name

    def requests(self, item: Item, chat: Chat | None) -> list[tuple[str, Any]]:
        """Ids and contents of an item's requests: an id is made of all that is asked."""
        if self.task.output_type == "multiple_choice":
            return [(make_id("ll", *pair), pair) for pair in item.pairs]
        if self.task.output_type == "loglikelihood_rolling":
            return [(make_id("rolling", item.prompt), item.prompt)]
        settings = self.task.generation_kwargs
        thinking = [chat.thinking, chat.max_thinking_tokens] if chat not in (None, Chat()) else []
        return [(make_id("text", item.prompt, list(settings.until), settings.max_gen_toks, chat is not None, *thinking), item.prompt)]


def read_parts(args: BenchmarkArgs) -> list[Part]:
    """Tasks with what they ask. The first document of each is rendered as soon as it is read, and the others when all are.

    Raises:
        InputError: a task or a file is wrong, a template cannot be used on a document, or none of a part's documents names a right choice.
    """
    found: list[tuple[TaskData, int]] = []
    tasks = find_tasks(args.tasks)
    if args.subsets and not any(task.subsets for task in tasks):
        raise InputError(f"None of {', '.join(task.task for task in tasks)} has subsets: leave --subsets out.")
    for task in tasks:
        num_fewshot = task.num_fewshot if args.num_fewshot is None else args.num_fewshot
        read = read_task(task, args.data, num_fewshot=num_fewshot)
        if task.subsets and args.subsets:
            if unknown := [name for name in args.subsets if name not in {data.subset for data in read}]:
                raise InputError(f"{task.task} has no subset {unknown[0]!r}: choose among {', '.join(data.subset for data in read)}.")
            read = [data for data in read if data.subset in args.subsets]
        for data in read:
            Prompter(data, num_fewshot=num_fewshot, seed=args.seed).items(1)
            found.append((data, num_fewshot))
    parts = []
    for data, num_fewshot in found:
        items = Prompter(data, num_fewshot=num_fewshot, seed=args.seed).items(args.limit)
        if data.task.output_type == "multiple_choice" and all(item.lacks_gold for item in items):
            raise InputError(
                f"None of the documents of {data.name} that are asked names a right choice: mend doc_to_target in the task file, or give a "
                "split with labels."
            )
        parts.append(Part(data, num_fewshot, items))
    return parts


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


# ---- before work is spent ----


@dataclass(frozen=True)
class Checked:
    """What benchmarks would ask of a model.

    Attributes:
        identity: hash of all that is asked and of how it is scored.
        num_read: characters that are read, those of a context once.
        num_answers, num_tokens: answers that are generated, and the most tokens of all of them.
    """

    identity: str
    num_read: int
    num_answers: int
    num_tokens: int


def check_benchmarks(args: BenchmarkArgs, tokenizer: Tokenizer, max_length: int, *, chat_tokens: Callable[[str], int]) -> Checked:
    """What would be asked of a model, once it is known that this can be done.

    Args:
        max_length: context of the model.
        chat_tokens: tokens of a prompt in its chat format, where nothing is cut.

    Raises:
        InputError: a task or a file is wrong, or the model's context holds no answer, not a choice, or in no document of a task its shots.
    """
    asked, num_read, num_answers, num_tokens = [], 0, 0, 0
    for part in read_parts(args):
        kwargs, generates = part.task.generation_kwargs, part.task.output_type == "generate_until"
        if lost := lost_shots(part, tokenizer, max_length):
            raise InputError(f"{lost}. Lower num_fewshot, or use a model with a longer context.")
        for item in part.items:
            _check_item(item, f"Document {item.number + 1} of {part.name}", tokenizer, max_length=max_length)
            if args.chat and generates and len(item.prompt.encode()) >= max_length // 2:
                _check_chat(item, part.name, chat_tokens(item.prompt), max_length=max_length)
        ids = [(item.number, item.golds, [name for name, _ in part.requests(item, args.asking)]) for item in part.items]
        asked.append([part.name, part.num_fewshot, part.task.model_dump(mode="json"), ids, [plain(item.doc) for item in part.items]])
        num_read += sum(map(len, {context for item in part.items for context, _ in item.pairs} | {item.prompt for item in part.items}))
        num_read += sum(len(continuation) for item in part.items for _, continuation in item.pairs)
        num_answers += len(part.items) * generates
        num_tokens += len(part.items) * generates * kwargs.max_gen_toks
    return Checked(make_id(asked), num_read, num_answers, num_tokens)


def _check_item(item: Item, where: str, tokenizer: Tokenizer, *, max_length: int) -> None:
    for continuation in {continuation for _, continuation in item.pairs}:
        if not continuation or (len(continuation.encode()) > max_length and len(tokenizer.encode(continuation)) > max_length):
            why = "longer than the model's context" if continuation else "empty"
            raise InputError(f"{where} has a choice that is {why}: take the document out.")


def _check_chat(item: Item, name: str, size: int, *, max_length: int) -> None:
    if size >= max_length:
        raise InputError(
            f"Document {item.number + 1} of {name} has a prompt of {size:,} tokens as a message and the model's context is {max_length:,}: "
            "leave chat out, so that it is cut, or use a model with a longer context."
        )


def lost_shots(part: Part, tokenizer: Tokenizer, max_length: int) -> str:
    """What to say where the model's context holds in no document of a part its shots, and "" where it does, by the shortest ones.

    Raises:
        InputError: it holds not even an answer.
    """
    generates = part.task.output_type == "generate_until"
    room = room_for_prompt(part.task.generation_kwargs, max_length) if generates else max_length + 1
    if not part.num_fewshot:
        return ""

    def text(item: Item) -> str:
        return max((context + continuation for context, continuation in item.pairs), key=len) if item.pairs else item.prompt

    shortest = sorted(part.items, key=lambda item: len(text(item)))[:NUM_LOOKED_AT]
    sizes = [len(ids) for ids in encode_texts(tokenizer, [text(item) for item in shortest])]
    if not sizes or min(sizes) <= room:
        return ""
    item, size = shortest[0], sizes[0]
    fit = shots_left(item, round(len(text(item)) * room / size))
    return (
        f"{part.name}: the shortest context has {size:,} tokens with {part.num_fewshot} shots and the model's context holds {room:,}: "
        f"{fit} of {part.num_fewshot} shots fit in it"
    )


def shots_left(item: Item, kept: int) -> int:
    """Shots that are whole in the characters that were kept of a context."""
    left, count = kept - item.question_chars, 0
    for chars in reversed(item.shot_chars):
        left -= chars
        if left < 0:
            break
        count += 1
    return count
