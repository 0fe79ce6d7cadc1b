"""Rollouts of reinforcement learning as rows: each answer of a group with its reward, so that people can look at them and rate them."""

from collections.abc import Iterator
from pathlib import Path

from gristmill.data.chat import Message
from gristmill.data.rows import Response
from gristmill.runs.journal import read_once

ROLLOUTS = "rollouts.jsonl"  # the journal of a stage of reinforcement learning


def read_rollouts(path: Path) -> Iterator[Response]:
    """Answers in the order of the journal, a group's together. It holds the last turn of each prompt alone; rewards come after answers."""
    rewards = {name: found for record in read_once(path) for name, found in record.get("rewards", {}).items()}
    for record in read_once(path):
        for sample, answer in enumerate(record.get("out", ())):
            reward = rewards[record["id"]][sample] if record["id"] in rewards else {}
            yield Response(
                f"{record['id']}-{sample}",
                record["id"],
                "",
                (Message("user", record["question"]),),
                answer["text"],
                f"step {record['step']}",
                1.0,
                sample,
                len(answer["tokens"]),
                sum(answer["logprobs"]),
                answer["finish"] == "stop",
                score=reward.get("total"),
                good=reward["right"] > 0 if reward else None,
            )
