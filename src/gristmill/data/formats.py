"""Dataset formats: one row of a public data set as a conversation or a preference pair, or the reason why it cannot be.

Understood: OpenAI `messages`, ShareGPT `conversations`, TRL's prompt-completion and preference forms, Alpaca, Dolly, question and answer,
HelpSteer2's turns inside `prompt`, HH-RLHF's transcripts, NeMo-Aligner's pairs. What a row means and we cannot use is refused by its name;
what means nothing to training is handed back as metadata.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gristmill.core.errors import InputError
from gristmill.data.chat import Conversation, Message, Role, check_turns, conversation
from gristmill.data.thinking import with_recorded_toggle

TALKS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "instruction", "question", "query", "problem", "input")
CONTEXTS = ("context", "passage", "article", "paragraph", "story", "premise")  # what a question may be about
ANSWERS = ("response", "completion", "output", "answer", "solution")
SYSTEMS = ("system", "system_prompt")
SPEAKERS: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant"),
}
UNUSABLE = {  # columns that change what a row means
    **dict.fromkeys(("tools", "functions"), "the chat formats have no tools"),
    **dict.fromkeys(("image", "images", "image_url", "video", "videos", "audio", "audios"), "the models read text alone"),
}
REWARDS = (("chosen_reward", "rejected_reward"), ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
MARK = re.compile(r"(?:^|\n)<extra_id_[01]>(System|User|Assistant)\n")  # HelpSteer2 writes earlier turns inside the prompt
SPEECH = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \n]?")  # HH-RLHF
ROW_ID = re.compile(r"[0-9a-f]{16}")


def parse_conversation(
    record: Mapping[str, Any], *, answered: bool, known: Collection[str] = (), tools: bool = False
) -> tuple[Conversation, dict[str, Any]]:
    """The conversation of a row, and its other columns.

    Args:
        answered: whether it ends with the assistant; else with the user, and an answer beside it is metadata.
        known: columns that the caller reads itself.
        tools: take OpenAI's form of tools, with their descriptions as `tools` among the other columns. Whether the chat format can say
            them shows when the row is rendered.

    Raises:
        InputError: the row is of a format that cannot be used, holds two conversations, or lacks one.
    """
    rest = _given(record, known, tools)
    if {"chosen", "rejected"} <= rest.keys():
        raise InputError("it looks like a preference pair (`chosen`, `rejected`): give such a file to `gristmill train dpo`.")
    if isinstance(rest.get("completions"), list):
        raise InputError("it looks like UltraFeedback (`completions`, several rated answers): choose one answer a row, as `response`.")
    if answered and rest.get("label") in (0, 1) and rest.keys() & {*ANSWERS, *TALKS}:  # which are False and True, too
        raise InputError(
            "it looks like KTO's unpaired form (`label`): an answer labelled false is none to imitate. Keep the true ones, without `label`."
        )
    system = _system(rest)
    turns = _talk(rest, tools=tools)
    if turns is None:
        turns = _question(rest)
        if turns is None:
            raise InputError(_lacks(record, answered))
        if answered:
            turns = _with_answer(turns, rest, record)
    turns = with_recorded_toggle(_with_system(system, turns), rest.get("reasoning"))
    check_turns(turns)
    if answered and turns[-1].trained and not turns[-1].fields and not turns[-1].content.strip():
        raise InputError("its answer is empty, which would teach a model to say nothing: leave the row out.")
    if (turns[-1].role == "assistant") != answered:
        raise InputError(f"it must end with the {'assistant' if answered else 'user'}.")
    return turns, rest


def parse_pair(record: Mapping[str, Any], *, known: Collection[str] = ()) -> tuple[Conversation, str, str, dict[str, Any]]:
    """Prompt, chosen and rejected answer of a row, and its other columns.

    The sides are answers, or whole conversations that are the same up to their last turn.

    Raises:
        InputError: as `parse_conversation`, or the sides belong to different prompts.
    """
    rest = _given(record, known)
    for name in ("chosen", "rejected"):
        if name not in rest and f"{name}_response" in rest:
            rest[name] = rest.pop(f"{name}_response")
    if missing := [name for name in ("chosen", "rejected") if name not in rest]:
        raise InputError(_no_pair(rest, missing))
    sides = [_side(rest.pop(name), name) for name in ("chosen", "rejected")]
    system = _system(rest)
    prompt = _talk(rest, sides)
    if prompt is None:
        prompt = _question(rest)
    whole = [_whole(side, prompt, name) for side, name in zip(sides, ("chosen", "rejected"), strict=True)]
    chosen, rejected = (_with_system(system, turns) for turns in whole)
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        check_turns(turns)
        if turns[-1].role != "assistant":
            raise InputError(f"`{name}` must end with the assistant.")
        if name == "chosen" and not turns[-1].content.strip():
            raise InputError("`chosen` is empty, which would teach a model to say nothing: leave the pair out.")
        if not turns[-1].trained:
            raise InputError(f"the answer in `{name}` has weight 0: there is nothing to learn from it, leave the pair out.")
    if chosen[:-1] != rejected[:-1]:
        raise InputError("`chosen` and `rejected` differ before their last answer: both must answer the same prompt.")
    return chosen[:-1], chosen[-1].content, rejected[-1].content, rest


def parse_turns(turns: Any, column: str, *, tools: bool = False) -> Conversation:
    """Messages of OpenAI's form (`role`, `content`) or ShareGPT's (`from`, `value`).

    A turn of weight 0, or `train: false`, is context: it is read, and no loss is taken on it.

    Raises:
        InputError: a turn is of a tool, holds more than text, or names its speaker in a way that the chat formats cannot say.
    """
    if isinstance(turns, Mapping):
        turns = [turns]
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise InputError(f"`{column}` must be a list of turns with `role` and `content`, or `from` and `value`.")
    return tuple(_turn(turn, f"turn {number} of `{column}`", tools) for number, turn in enumerate(turns, 1))


def _turn(turn: Any, where: str, tools: bool) -> Message:
    if not isinstance(turn, Mapping):
        raise InputError(f"{where} is not an object: give every turn `role` and `content`.")
    given = {k: v for k, v in turn.items() if v is not None}
    speaker = given["role"] if "role" in given else given.get("from")
    more = ("tool_calls", "reasoning_content", "reasoning", "thinking")
    if tools and (speaker == "tool" or any(given.get(name) for name in more)) and given.get("role") in ("assistant", "tool"):
        try:
            (message,) = conversation([turn], tools=True)
        except InputError as e:
            raise InputError(f"{where}: {e}") from e
        return message
    if speaker in ("tool", "function", "function_call", "observation", "ipython") or given.get("tool_calls") or given.get("function_call"):
        raise InputError(f"{where} calls a tool or is its answer: the chat formats have no tools. Write it as text, or leave the row out.")
    content = given["content"] if "content" in given else given.get("value")
    if isinstance(content, list):
        parts = [part for part in content if part is not None]
        if not parts or not all(isinstance(p, Mapping) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
            raise InputError(f"{where} has parts that are not text: the models read text alone. Leave the row out.")
        content = "\n".join(part["text"] for part in parts)
    role = SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None or not isinstance(content, str):
        raise InputError(
            f"{where} needs a role (system, user, assistant; or human and gpt) and text as content: it has the role {speaker!r} "
            f"and {'text' if isinstance(content, str) else 'no text'}."
        )
    if given.get("name"):
        raise InputError(f"{where} has the `name` {given['name']!r}, which the chat formats cannot say: put it into the text, or drop it.")
    if given.get("prefix"):
        raise InputError(f"{where} is a `prefix`, an answer that is to be continued: give the whole answer.")
    (message,) = conversation([{"role": role, "content": content} | {k: given[k] for k in ("weight", "train", "training") if k in given}])
    return message


def _given(record: Mapping[str, Any], known: Collection[str], tools: bool = False) -> dict[str, Any]:
    """The columns that hold something, without those that the caller reads."""
    rest = {name: value for name, value in record.items() if value is not None and name not in known}
    described = _tools(rest.pop("tools", None)) if tools else []
    for name, why in UNUSABLE.items():
        if rest.get(name):
            raise InputError(f"it has `{name}`, and {why}: leave such rows out.")
        rest.pop(name, None)
    meta = rest.pop("meta", {})  # our own rows hold such columns there
    rest |= meta if isinstance(meta, dict) and not meta.keys() & rest.keys() else {"meta": meta}
    return rest | ({"tools": described} if described else {})


def _tools(value: Any) -> list[Any]:
    """Descriptions of tools, as a list or as JSON of one."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InputError("`tools` is text that is no JSON: give a list of descriptions.") from None
    if value and (not isinstance(value, list) or not all(isinstance(one, dict) for one in value)):
        raise InputError("`tools` must be a list of descriptions, as in OpenAI's form.")
    return list(value or ())


def _talk(rest: dict[str, Any], sides: Sequence[str | Conversation] = (), *, tools: bool = False) -> Conversation | None:
    """The turns of `messages` or `conversations`. Other columns may repeat what they say, but not say something else."""
    names = [name for name in TALKS if rest.get(name)]
    if not names:
        return None
    turns, *others = [parse_turns(rest.pop(name), name, tools=tools) for name in names]
    if any(other != turns for other in others):
        raise InputError(f"it holds different conversations in {_join(names)}: keep one of them.")
    said = {m.content for m in turns}
    for name in ("prompt", "instruction", "question", "query", "response", "completion", "output"):
        value = rest.get(name)
        same = value in said or bool(ROW_ID.fullmatch(value)) if isinstance(value, str) else value is None
        if isinstance(value, list):
            found = parse_turns(value, name)
            same = found in (turns[: len(found)], turns[-len(found) :])
        if not same:
            raise InputError(f"it has both `{names[0]}` and `{name}`, which say different things: keep one of them.")
        rest.pop(name, None)
    if sides and turns[-1].role == "assistant":  # UltraFeedback's binarized form repeats the chosen side
        if turns != sides[0]:
            raise InputError(f"`{names[0]}` ends with an answer that is not `chosen`: give the prompt alone.")
        return None
    return turns


def _question(rest: dict[str, Any]) -> Conversation | None:
    """The turns before the answer, of a row that has a column for each side."""
    if "instruction" in rest:
        text, extra = rest.pop("instruction"), [rest.pop(name) for name in ("input", "context") if name in rest]
        if not all(isinstance(part, str) for part in (text, *extra)):
            raise InputError("`instruction` and `input` (or `context`) must be text.")
        before = _history(rest.pop("history", None))
        turns: Conversation = (*before, Message("user", "\n\n".join(part for part in (text, *extra) if part)))
        name = "instruction"
    else:
        names = [name for name in QUESTIONS if name in rest]
        if not names:
            return None
        name, value = names[0], rest.pop(names[0])
        if not isinstance(value, str | list | dict):
            raise InputError(f"`{name}` must be text, or a list of turns with `role` and `content`.")
        turns = _marked(value) if isinstance(value, str) else parse_turns(value, name)
        about = (other for other in CONTEXTS if isinstance(text := rest.get(other), str) and text not in turns[-1].content)
        if other := next(about, ""):
            raise InputError(f"it has `{other}` beside `{name}`: put it into the question, where it shall stand.")
    if doubles := [other for other in QUESTIONS if rest.get(other) not in (None, "", turns[-1].content)]:
        raise InputError(f"it has both `{name}` and {_join(doubles)}: say which is the question by leaving the other out.")
    for other in QUESTIONS:
        rest.pop(other, None)
    for other in ("choices", "options"):
        if unsaid := [text for text in _option_texts(rest.get(other)) if text not in turns[-1].content]:
            raise InputError(
                f"it has `{other}` (such as {unsaid[0][:40]!r}) which `{name}` does not say: write the options into the question, with "
                "their letters, and the letter as the answer."
            )
    return turns


def _option_texts(value: Any) -> list[str]:
    """The options of a question, as MMLU (texts), ARC (`text` and `label`) and MedQA (letter: text) write them."""
    if isinstance(value, Mapping):
        value = value["text"] if isinstance(value.get("text"), list) else list(value.values())
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _history(pairs: Any) -> Conversation:
    """Earlier turns as [question, answer] pairs (Alpaca's form with several turns)."""
    if not pairs:
        return ()
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs):
        raise InputError("`history` must be a list of [question, answer].")
    return tuple(message for q, a in pairs for message in (Message("user", q), Message("assistant", a)))


def _marked(text: str) -> Conversation:
    """A prompt that may hold earlier turns, as HelpSteer2 writes them."""
    first, *pieces = MARK.split(text)
    if not pieces and text.startswith("\n\nHuman: "):
        first, *pieces = SPEECH.split(text.rstrip())
    if not pieces:
        return (Message("user", text),)
    turns = [Message("user", first)] if first else []
    turns += [Message(SPEAKERS[who.lower()], said) for who, said in zip(pieces[::2], pieces[1::2], strict=True)]
    if turns[0] == Message("system", ""):
        turns = turns[1:]
    if len(turns) > 1 and turns[-1] == Message("assistant", ""):  # the header of the answer that follows
        turns = turns[:-1]
    return tuple(turns)


def _with_answer(turns: Conversation, rest: dict[str, Any], record: Mapping[str, Any]) -> Conversation:
    names = [name for name in ANSWERS if name in rest]
    if len(names) > 1:
        raise InputError(f"it has the answers {_join(names)}: keep the one to imitate.")
    if not names:
        if turns[-1].role == "assistant":
            return turns
        raise InputError(_lacks(record, True))
    return _whole(_side(rest.pop(names[0]), names[0]), turns, names[0])


def _side(value: Any, name: str) -> str | Conversation:
    if isinstance(value, str):
        return value
    if not isinstance(value, list | dict):
        raise InputError(f"`{name}` must be text, or turns with `role` and `content`.")
    return parse_turns(value, name)


def _whole(side: str | Conversation, prompt: Conversation | None, name: str) -> Conversation:
    """A whole conversation of an answer, or of a conversation that holds the prompt already."""
    if isinstance(side, str):
        if prompt is not None:
            return (*prompt, Message("assistant", side))
        first, *pieces = SPEECH.split(side)
        if first.strip() or not pieces:
            raise InputError(
                f"`{name}` is plain text and there is no prompt (TRL's implicit prompt): where the answer begins cannot be told. "
                "Give `prompt`, and the answers alone in `chosen` and `rejected`."
            )
        return tuple(Message(SPEAKERS[who.lower()], said) for who, said in zip(pieces[::2], pieces[1::2], strict=True))
    if side[0].role == "assistant":
        if prompt is None:
            raise InputError(f"`{name}` begins with the assistant and there is no prompt: give `prompt`.")
        return (*prompt, *side)
    if prompt is not None:
        system, asked = (prompt[:1], prompt[1:]) if prompt[0].role == "system" else ((), prompt)
        body = side[1:] if side[0].role == "system" else side
        first_or_last = len(asked) == 1 and asked[0] in (*body[:1], *body[-2:-1])
        if body[: len(asked)] != asked and not first_or_last:
            raise InputError(f"the prompt inside `{name}` is another than `prompt`: give one of them.")
        if system and side[0].role == "system" and side[:1] != system:
            raise InputError(f"the system turn of `{name}` is another than that of `prompt`: give one of them.")
        return (*system, *body) if system else side
    return side


def _system(rest: dict[str, Any]) -> str:
    names = [name for name in SYSTEMS if name in rest]
    values = [rest.pop(name) for name in names]
    if not all(isinstance(value, str) for value in values) or len(set(values)) > 1:
        raise InputError(f"{_join(names)} must hold one system prompt, as text.")
    return values[0] if values else ""


def _with_system(text: str, turns: Conversation) -> Conversation:
    if not text:
        return turns
    if turns and turns[0].role == "system":
        if turns[0].content != text:
            raise InputError("it has a system turn and another text in `system`: keep one of them.")
        return turns
    return (Message("system", text), *turns)


def _join(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


def _lacks(record: Mapping[str, Any], answered: bool) -> str:
    found = ", ".join(name for name, value in record.items() if value is not None) or "none"
    wanted = f"one of {', '.join(QUESTIONS)}" + (f" and one of {', '.join(ANSWERS)}" if answered else "")
    looks = "it looks like plain documents (`text`), which are for pretraining. " if "text" in record else ""
    return f"{looks}it lacks a conversation (its columns: {found}): give `messages`, or {wanted}."


def _no_pair(rest: Mapping[str, Any], missing: Sequence[str]) -> str:
    looks = "it"
    if "label" in rest and rest.keys() & set(ANSWERS):
        looks = "it looks like KTO's unpaired form (an answer and its `label`), and a preference loss compares two answers: it"
    elif isinstance(rest.get("completions"), list):
        looks = "it looks like UltraFeedback (`completions`): choose a better and a worse one. It"
    elif {"helpfulness", "correctness"} <= rest.keys():
        looks = "it looks like HelpSteer2's ratings, which are for `gristmill train reward`: it"
    elif rest.keys() & {"response_1", "response1", "responses", "overall_preference", "preference_strength"}:
        looks = "it looks like HelpSteer's preferences (two responses and a mark): name the better `chosen`. It"
    elif rest.keys() & set(ANSWERS) or any(name in rest for name in TALKS):
        looks = "it looks like demonstrations, which are for `gristmill train sft`: it"
    return f"{looks} lacks {_join(missing)}: give prompt (or messages), chosen and rejected."
