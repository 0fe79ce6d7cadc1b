"""Split a GSM8K-style file (question, answer ending with `#### n`) into the files that a recipe of one's own needs.

    python bench/gsm8k.py test.jsonl OUT
    gristmill init --model miniature --demonstrations OUT/demonstrations.jsonl --ratings OUT/ratings.jsonl \
        --prompts OUT/prompts.jsonl --evaluation OUT/evaluation.jsonl --name gsm8k --out OUT/gsm8k.yaml
    gristmill run OUT/gsm8k.yaml

It also writes OUT/llama, a Llama of random weights with a tokenizer of these problems, to give to `--model` in place of `miniature`:
every stage runs on it, and it learns next to nothing.

The four files share no question. The ratings are made by rule, not by people: a problem's own solution is rated 4 for correctness,
another problem's solution 0.
"""

import json
import random
import sys
from pathlib import Path

from gristmill.data.chat_format import FORMATS
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.hf_save import save_model
from gristmill.model.transformer import Transformer

MAX_QUESTION, MAX_SOLUTION = 220, 220  # characters: the miniature Base has a context of 512 tokens
SIZES = {"evaluation": 60, "demonstrations": 100, "ratings": 80, "prompts": 100}


def main(source: Path, out: Path) -> None:
    """Write the four files and the model."""
    problems = []
    for line in source.read_text().splitlines():
        row = json.loads(line)
        solution, answer = row["answer"].rsplit("####", 1)
        if len(row["question"]) <= MAX_QUESTION and len(solution) <= MAX_SOLUTION:
            problems.append((row["question"], f"{solution.strip()}\nThe answer is {answer.strip()}.", answer.strip()))
    random.Random(0).shuffle(problems)
    out.mkdir(parents=True, exist_ok=True)
    start = 0
    for name, size in SIZES.items():
        part, start = problems[start : start + size], start + size
        if len(part) < size:
            raise SystemExit(f"{source} has only {len(problems)} problems that are short enough")
        rows: list[dict[str, object]] = []
        for i, (question, solution, answer) in enumerate(part):
            if name == "demonstrations":
                rows.append({"task": "gsm8k", "prompt": question, "response": solution})
            elif name == "ratings":
                other = part[(i + 1) % len(part)][1]
                for text, mark in ((solution, 4), (other, 0)):
                    marks = {"helpfulness": mark, "correctness": mark, "coherence": 4, "complexity": 2, "verbosity": 2}
                    rows.append({"task": "gsm8k", "prompt": question, "response": text, **marks})
            else:
                rows.append({"task": "gsm8k", "prompt": question, "answer": answer})
        (out / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        print(f"{name}: {len(rows)} rows")
    tokenizer = Tokenizer.train([text for problem in problems[start:] for text in problem[:2]], 1024, FORMATS["llama3"].special_tokens)
    blocks = uniform_blocks(num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, ffn_size=352)
    save_model(
        Transformer(ModelConfig("llama", tokenizer.vocab_size, 128, blocks, max_positions=1024, rotary_fraction=1.0)),
        tokenizer,
        out / "llama",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
