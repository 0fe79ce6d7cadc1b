"""Guard head: rows with labelled categories, thresholds at a false-positive rate, and the verdicts of a guard model's folder."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from gristmill.core.device import pick_device
from gristmill.core.errors import InputError
from gristmill.core.threads import num_workers, workers
from gristmill.core.untrusted import quoted
from gristmill.data.chat import Message
from gristmill.data.chat_format import ChatFormat
from gristmill.data.find_format import find_format
from gristmill.data.formats import parse_conversation
from gristmill.data.rows import Rated, make_id, read_records
from gristmill.data.tokenizer import Tokenizer
from gristmill.judge.guards import GuardVerdict, Role, Taxonomy, plain_name
from gristmill.model.dtype import pick_dtype
from gristmill.model.guard import THRESHOLD, GuardModel
from gristmill.model.hf import load_guard
from gristmill.model.packed import pack
from gristmill.model.transformer import PRECISIONS
from gristmill.train.objectives.guard import judged_ids

PACKED_TOKENS = 4096
HELD_OUT = 5  # one row in so many fits the thresholds and is not trained on
MIN_NEGATIVES = 20  # rows without a category, below which its threshold stays THRESHOLD

_AEGIS2 = ("prompt_label", "response_label", "violated_categories")
_KNOWN = ("id", "task", "codes", "labels", "text_type", "num_annotations", "id_if_redacted", *_AEGIS2)


def read_labelled(path: Path, taxonomy: Taxonomy) -> list[Rated]:
    """Conversations with labels of the taxonomy's categories for their last turn, a user's or the assistant's.

    A row has `codes` (the violated ones; all others are not) or `labels` ({code: true, false or null}, absent ones missing), or the
    columns of Aegis 2.0 (prompt, response, prompt_label, response_label, violated_categories) or 1.0 (text, labels_0, ...). There names
    are compared with the taxonomy's; an unsafe row none of whose names it knows has no label and is left out.

    Raises:
        InputError: a row has no conversation or no labels, or names an unknown code.
    """
    out = []
    for number, record in enumerate(read_records(path), 1):
        where = f"Row {number} of {path}"
        annotators = [name for name in record if name.startswith("labels_")]
        talk = {k: v for k, v in record.items() if k not in (*_KNOWN, *annotators)}
        if annotators and isinstance(talk.get("text"), str):
            talk = {"messages": [{"role": "user", "content": talk["text"]}]}
        answered = _is_answered(talk)
        if not answered:
            talk = {k: v for k, v in talk.items() if k != "response"}
        try:
            messages, meta = parse_conversation(talk, answered=answered)
            labels = _labels(record, taxonomy, answered, annotators)
        except InputError as e:
            raise InputError(f"{where}: {e}") from e
        if any(label is not None for label in labels):
            out.append(Rated(make_id("guard", number, [m.content for m in messages]), "guard", messages, labels, meta=meta))
    if not out:
        raise InputError(f"{path} holds no row with a label of {', '.join(taxonomy.codes[:5])}: check the taxonomy and the file.")
    return out


def _is_answered(talk: dict[str, Any]) -> bool:
    turns = next((talk[k] for k in ("messages", "conversation", "conversations") if isinstance(talk.get(k), list) and talk[k]), None)
    if turns is not None:
        last = turns[-1] if isinstance(turns[-1], dict) else {}
        return (last.get("role") or last.get("from")) in ("assistant", "gpt", "model")
    return any(isinstance(talk.get(k), str) and talk[k].strip() for k in ("response", "output", "answer", "completion"))


def _labels(record: dict[str, Any], taxonomy: Taxonomy, answered: bool, annotators: Sequence[str]) -> tuple[float | None, ...]:
    if isinstance(codes := record.get("codes"), list):
        _check_codes(codes, taxonomy)
        return tuple(float(code in codes) for code in taxonomy.codes)
    if isinstance(labels := record.get("labels"), dict):
        _check_codes(list(labels), taxonomy)
        if not all(value is None or value in (0, 1) for value in labels.values()):
            raise InputError("`labels` hold true, false or null for each code.")
        return tuple(None if labels.get(code) is None else float(labels[code]) for code in taxonomy.codes)
    if annotators:
        votes = [_named(str(record[name] or ""), taxonomy) for name in annotators if record[name]]
        return tuple(float(sum(code in vote for vote in votes) * 2 >= len(votes) > 0) for code in taxonomy.codes)
    label = record.get("response_label" if answered else "prompt_label")
    if label in ("safe", "unsafe"):
        named = _named(str(record.get("violated_categories") or ""), taxonomy)
        if label == "unsafe" and not named:
            return (None,) * len(taxonomy.codes)
        return tuple(float(label == "unsafe" and code in named) for code in taxonomy.codes)
    raise InputError("it has neither `codes` nor `labels` of the taxonomy, nor the columns of Aegis: say what the last turn violates.")


def _check_codes(codes: Sequence[Any], taxonomy: Taxonomy) -> None:
    for code in codes:
        if code not in taxonomy.codes:
            raise InputError(f"{quoted(code)} is no code of the taxonomy: choose from {', '.join(taxonomy.codes)}.")


def _named(text: str, taxonomy: Taxonomy) -> set[str]:
    """Codes of the categories that a list of names, parted by commas, holds."""
    names = {plain_name(name) for name in text.split(",")}
    return {c.code for c in taxonomy.categories if plain_name(c.name) in names or c.code.lower() in names}


def split_held_out(rows: Sequence[Rated]) -> tuple[list[Rated], list[Rated]]:
    """(to train on, held out for thresholds): which one a row belongs to depends on its id alone."""

    def number(name: str) -> int:
        return int(name if re.fullmatch(r"[0-9a-f]{1,32}", name) else make_id(name), 16)  # a caller's rows have any ids

    held = [row for row in rows if number(row.id) % HELD_OUT == 0]
    kept = [row for row in rows if number(row.id) % HELD_OUT]
    return (kept, held) if kept else (list(rows), [])


def fit_thresholds(scores: Sequence[Sequence[float]], labels: Sequence[Sequence[float | None]], max_fpr: float) -> list[float]:
    """The lowest threshold of each category at which at most `max_fpr` of the rows without it reach it."""
    out = []
    for column in range(len(scores[0]) if scores else 0):
        negatives = sorted((s[column] for s, row in zip(scores, labels, strict=True) if row[column] == 0), reverse=True)
        if len(negatives) < MIN_NEGATIVES:
            out.append(THRESHOLD)
            continue
        highest_passed = negatives[math.floor(max_fpr * len(negatives))] if max_fpr < 1 else 0.0
        out.append(min(1.0, math.nextafter(highest_passed, 2.0)))
    return out


class GuardScorer:
    """A guard model with its tokenizer and chat format; it computes where the model is.

    Args:
        permissive: the caution category alone is safe.
    """

    def __init__(
        self, model: GuardModel, tokenizer: Tokenizer, chat_format: ChatFormat, *, name: str = "guard", permissive: bool = False
    ) -> None:
        self.model, self.tokenizer, self.chat_format = model.eval(), tokenizer, chat_format
        self.name, self.permissive = name, permissive

    def probabilities(self, conversations: Sequence[Sequence[Message]]) -> list[list[float]]:
        """Probability of each category for the last turn of each conversation.

        Raises:
            InputError: a conversation cannot be rendered or exceeds the model's context.
        """
        limit = self.model.backbone.config.max_positions
        rendered = []
        for i, messages in enumerate(conversations):
            ids, end = judged_ids(Rated(str(i), "", tuple(messages)), self.chat_format, self.tokenizer)
            if len(ids) > limit:
                raise InputError(f"Conversation {i} has {len(ids)} tokens and the guard's context is {limit}: shorten it.")
            rendered.append((i, ids, end))
        groups: list[list[tuple[int, list[int], int]]] = [[]]
        for item in sorted(rendered, key=lambda item: len(item[1])):
            if groups[-1] and sum(len(ids) for _, ids, _ in groups[-1]) + len(item[1]) > PACKED_TOKENS:
                groups.append([])
            groups[-1].append(item)
        out: dict[int, list[float]] = {}
        with workers(num_workers(self.model)) as each:
            for group, rows in zip(groups, each(self._score, groups), strict=True):
                out |= {i: row for (i, _, _), row in zip(group, rows, strict=True)}
        return [out[i] for i in range(len(rendered))]

    @torch.inference_mode()
    def _score(self, group: list[tuple[int, list[int], int]]) -> list[list[float]]:
        if not group:
            return []
        ids_T, shape, _ = pack([[ids] for _, ids, _ in group], self.model.backbone.embedding.device)
        starts = [sum(len(ids) for _, ids, _ in group[:k]) for k in range(len(group))]
        ends_N = torch.tensor([start + end for start, (_, _, end) in zip(starts, group, strict=True)], device=ids_T.device)
        return cast(list[list[float]], self.model(ids_T, shape, ends_N).sigmoid().tolist())

    def verdicts(self, conversations: Sequence[Sequence[Message]]) -> list[GuardVerdict]:
        """Verdict on the last turn of each conversation."""
        out = []
        for messages, row in zip(conversations, self.probabilities(conversations), strict=True):
            over = tuple(c for c, p, limit in zip(self.model.codes, row, self.model.thresholds, strict=True) if p >= limit)
            counted = [code for code in over if not (self.permissive and code == self.model.caution)]
            scores = {code: round(p, 6) for code, p in zip(self.model.codes, row, strict=True)} | {"unsafe": round(max(row), 6)}
            role: Role = "assistant" if messages[-1].role == "assistant" else "user"
            out.append(GuardVerdict(role, bool(counted), over, scores, self.name))
        return out


def load_guard_scorer(
    folder: Path, chat_format: str = "auto", *, device: str = "auto", dtype: str = "auto", permissive: bool = False
) -> GuardScorer:
    """The scorer of a guard model's folder, on a device as `pick_device` takes it, computing in a type as `pick_dtype` takes it."""
    where = pick_device(device)
    precision = PRECISIONS[pick_dtype(dtype, folder, where)]
    model, tokenizer = load_guard(folder, precision, vector_dtype=torch.float32, device=where)
    return GuardScorer(model, tokenizer, find_format(chat_format, tokenizer), name=folder.resolve().name, permissive=permissive)
