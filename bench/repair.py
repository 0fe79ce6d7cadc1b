"""How often repair makes failing answers pass, by type of instruction: samples of a model on prompts of the recipe `real`.

PYTHONPATH=src python bench/repair.py SmolLM2-135M-Instruct
"""

import argparse
import random
from collections import defaultdict
from pathlib import Path

from gristmill.core.config import RECIPES, read
from gristmill.core.response_text import repetition
from gristmill.data.chat import Message
from gristmill.engine.load import EngineArgs, load_engine
from gristmill.generation.api import Request, SamplingParams
from gristmill.synth.parsing import parse_list
from gristmill.synth.pipelines.instructions import TOPIC, ask_about, draw_constraints
from gristmill.synth.templates import TemplatePack
from gristmill.synth.writer import Topic
from gristmill.verify.ifeval import check_instructions
from gristmill.verify.repair import repair
from gristmill.verify.text_edits import MAX_REPETITION


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--system", default="")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=200)
    args = parser.parse_args()
    forms = parse_list(TemplatePack.load()["instruction_requests"].render(topic=TOPIC))
    topics = [Topic(name, name) for name in read(RECIPES / "real.yaml")["topics"]["own"]]
    sampling = SamplingParams(temperature=0.8, max_tokens=args.max_tokens, n=args.samples)
    requests, checks_of = [], {}
    for question in ask_about(topics, forms, args.prompts, random.Random(0)):
        rng = random.Random(f"0 {question.id}")
        checks, words = draw_constraints(rng, question.text, rng.randint(1, 3))
        system = [Message("system", args.system)] if args.system else []
        requests.append(Request(question.id, (*system, Message("user", f"{question.text}\n\n{words}")), sampling, 0))
        checks_of[question.id] = checks
    num: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    whole = [0, 0, 0]
    for request, outs in load_engine(args.model, EngineArgs()).generate(requests):
        checks = checks_of[request.id]
        material = [(place, c.text) for place, c in enumerate(outs) if c.finish == "stop" and repetition(c.text) <= MAX_REPETITION]
        for place, completion in enumerate(outs):
            others = [text for other, text in material if other != place]
            for counts, asked in ((whole, checks), *((num[check["id"]], [check]) for check in checks)):
                passed = all(check_instructions(asked, completion.text))
                done = None if passed else repair({"kind": "instructions", "checks": asked}, completion.text, others)
                for at, value in enumerate((True, not passed, done is not None)):
                    counts[at] += value
    for name, (answers, failing, repaired) in [*sorted(num.items()), ("all instructions of a prompt", whole)]:
        print(f"{name:<46} answers {answers}  failing {failing}  repaired {repaired}")


if __name__ == "__main__":
    main()
