"""Files that other tools read, and the card that says what they are.

export/sft.jsonl, sft.parquet                    `messages`: TRL, datasets
export/preference.jsonl, preference.parquet      `prompt`, `chosen`, `rejected` as messages, and both rewards: TRL, datasets
export/nemo_aligner.jsonl                        `prompt`, `chosen_response`, `rejected_response` and both rewards, as text
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gristmill.core.echo import sentence
from gristmill.core.io import replacing, write_text
from gristmill.data.chat import to_dicts
from gristmill.data.rows import Demonstration, Pair, json_line
from gristmill.runs import artifacts
from gristmill.runs.journal import Journal
from gristmill.workflows.dataset.recipe import DatasetRecipe

Item = TypeVar("Item")


def export(folder: Path, recipe: DatasetRecipe, results: dict[str, Any], kept: Sequence[Demonstration], compared: Sequence[Pair]) -> None:
    """Write all of them."""
    write_tables(folder, kept, compared)
    write_text(folder / "README.md", card(recipe, results, kept, compared))


def write_tables(folder: Path, kept: Sequence[Demonstration], compared: Sequence[Pair]) -> None:
    """Write the tables without the card."""
    sft = [{"id": d.id, "task": d.task, "messages": to_dicts(d.messages), "generator": d.origin} for d in kept]
    preference = [
        {
            "id": p.id,
            "task": p.task,
            "prompt": to_dicts(p.messages),
            "chosen": [{"role": "assistant", "content": p.chosen}],
            "rejected": [{"role": "assistant", "content": p.rejected}],
            "chosen_reward": p.chosen_reward,
            "rejected_reward": p.rejected_reward,
            "judge": p.judge,
        }
        for p in compared
    ]
    nemo = [
        {
            "prompt": _text(p),
            "chosen_response": p.chosen,
            "rejected_response": p.rejected,
            "chosen_reward": p.chosen_reward,
            "rejected_reward": p.rejected_reward,
        }
        for p in compared
    ]
    out = folder / "export"
    for name, rows in (("sft", sft), ("preference", preference)):
        _jsonl(out / f"{name}.jsonl", rows)
        _parquet(out / f"{name}.parquet", rows)
    _jsonl(out / "nemo_aligner.jsonl", nemo)


def _text(pair: Pair) -> str:
    """A prompt as one text: earlier turns stand in it as in HelpSteer2, which the readers of both programs know."""
    first, *others = pair.messages
    text = f"<extra_id_0>System\n{first.content}" if first.role == "system" else first.content
    return text + "".join(f"\n<extra_id_1>{m.role.capitalize()}\n{m.content}" for m in others)


def _jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json_line(row, f"Row {number} for {path}") for number, row in enumerate(rows, 1)))


def _parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if rows:
        with replacing(path) as temporary:
            pq.write_table(pa.Table.from_pylist(list(rows)), temporary)
    else:
        path.unlink(missing_ok=True)


def card(recipe: DatasetRecipe, results: dict[str, Any], kept: Sequence[Demonstration], compared: Sequence[Pair]) -> str:
    """The dataset card: metadata as the Hugging Face Hub reads it, then counts, funnel, models and seed."""
    num = max(len(kept), len(compared))
    sizes = [(1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M")]
    configs = [("sft", kept), ("preference", compared)]
    metadata = {
        "license": recipe.licence,
        "pretty_name": recipe.name,
        "tags": ["synthetic", "gristmill"],
        "size_categories": [next((name for most, name in sizes if num < most), "1M<n<10M")],
        "configs": [{"config_name": name, "data_files": f"export/{name}.parquet"} for name, rows in configs if rows],
    }
    formats = results.get("chat_formats", {})
    own = [g.folder.name if g.folder else "" for g in recipe.generators]
    local = [f"{_code(name)} (in process, chat format: {formats.get(name, 'auto')})" for name in own]
    writers = ", ".join(_code(g.model) if g.base_url else told for g, told in zip(recipe.generators, local, strict=True))
    reward = recipe.judging.reward
    named = (reward.model if reward.base_url else reward.folder.name if reward.folder else "") if reward else ""
    judge = f"{_code(named)}, weights {reward.weights}" if reward else "none"
    tasks = Counter(d.task for d in kept)
    compared_tasks = Counter(p.task for p in compared)
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        f"# {recipe.name}",
        "",
        f"{len(kept):,} conversations and {len(compared):,} preference pairs, written by {writers} with gristmill.",
        "",
        f"- seed {recipe.seed}, templates {_code(Path(recipe.templates).name)}",
        f"- reward model: {judge}",
        f"- kept answers: {' '.join(recipe.judging.keep.split()) or 'all that ended and that no verifier refused'}",
        f"- {results['prompts']:,} prompts, {results['responses']:,} answers; calls that failed for good: {results['calls']['failed']:,}",
        "",
        "| task | conversations | pairs |",
        "|---|---|---|",
        *(f"| {_cell(task)} | {tasks[task]:,} | {compared_tasks[task]:,} |" for task in sorted(tasks | compared_tasks)),
        "",
        "What became of everything that was written:",
        "",
        "```json",
        json.dumps(results["funnel"] | {"dropped": results["dropped"]}, indent=1),
        "```",
        "",
    ]
    return "\n".join(lines)


def _code(name: str) -> str:
    """A name in Markdown, as code on one line."""
    return f"`{sentence(name).replace('`', chr(39))}`"


def _cell(name: str) -> str:
    """A name in a Markdown table, where it makes neither a column nor HTML."""
    return re.sub(r"([\\`|<>\[\]])", r"\\\1", sentence(name))


def write_calls(folder: Path) -> int:
    """All journals of a run as `calls.parquet`, a few thousand rows at a time; returns the number of calls."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("id", "model", "for", "error")
    schema = pa.schema([*((name, pa.string()) for name in names), ("parents", pa.list_(pa.string())), ("answers", pa.list_(pa.string()))])
    path = folder / "calls.parquet"
    num = 0
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for found in sorted(folder.glob(f"*/{artifacts.CALLS.file}")):
            with Journal(found, read_only=True) as journal:
                for part in batched(journal.values(), 4096):
                    rows = [
                        {name: r.get(name) for name in names}
                        | {"parents": r.get("parents") or [], "answers": [out[0] for out in r.get("out", ())]}
                        for r in part
                    ]
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    num += len(rows)
    return num


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Items in lists of a size, the last one shorter."""
    stream = iter(items)
    while part := list(itertools.islice(stream, size)):
        yield part
