"""What the checks of rephrased documents let through: texts that say what their source says, and texts that were spoilt on purpose.

    PYTHONPATH=src python bench/rephrase.py

Sources are paragraphs of English prose on this machine (documentation of packages and of the system) with names and numbers in them. A
good text is the source with its sentences in another order, some of its small words replaced by others and a tenth of the sentences left
out. No model writes here: how many good texts of a model the checks lose depends on the model. Prints the share kept of each kind.
"""

import argparse
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from gristmill.curate.transforms import faithfulness
from gristmill.curate.transforms.rephrase import LIMITS, Rephrase

SENTENCE = re.compile(r"(?<=[.!?])\s+")
# what a small model writes instead
ABOUT = (
    *("The text is clear and correct, with no errors, and it is kept to the form that was asked for.", "It is left unchanged."),
    *("The text is reorganized into several paragraphs, each focusing on a specific aspect of the main topic.",),
    *("The text is written in plain text with no titles, notes, or remarks.", "The language is clear and easy to understand."),
    *("The original meaning is kept while the sentences are edited to improve clarity and coherence.",),
    *("The answer is short and to the point, and its structure is well-organized, with a clear introduction.",),
)
OTHER_WORDS = {"is": "remains", "are": "remain", "use": "employ", "may": "might", "if": "whenever", "also": "moreover", "can": "could"}


def paragraphs() -> Iterator[str]:
    """Runs of prose of 80 to 300 words with names and numbers, in an order that looks random and is always the same."""
    roots = (Path(sysconfig.get_paths()["purelib"]), Path("/usr/share/doc"), Path("/usr/share/perl"))
    files = sorted({path for root in roots for suffix in ("*.rst", "*.md", "*.txt", "*.pod", "METADATA") for path in root.rglob(suffix)})
    random.Random(0).shuffle(files)
    seen: set[str] = set()
    for path in files:
        try:
            blocks = re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
        prose = [" ".join(b.split()) for b in blocks if re.match(r"[A-Z][a-z]", b) and b.rstrip().endswith(".") and "  " not in b.strip()]
        text, size = [], 0
        for block in prose:
            text.append(block)
            size += len(block.split())
            if size >= 80:
                whole = " ".join(text)
                good = size <= 300 and len(faithfulness.entities(whole)) >= 4 and len(faithfulness.numbers(whole)) >= 3
                if good and whole not in seen and len(SENTENCE.split(whole)) >= 4:
                    seen.add(whole)
                    yield whole
                text, size = [], 0


def good(draw: random.Random, source: str, other: str) -> str:
    said = SENTENCE.split(source)
    said = draw.sample(said, len(said) - len(said) // 10)
    return " ".join(" ".join(OTHER_WORDS.get(word, word) for word in sentence.split(" ")) for sentence in said)


def without_most(draw: random.Random, source: str, other: str) -> str:
    said = SENTENCE.split(source)
    return " ".join(said[: max(1, len(said) // 4)])


def numbers_changed(draw: random.Random, source: str, other: str) -> str:
    return re.sub(r"\d+", lambda m: str(int(m[0]) + draw.randint(1, 9)) if draw.random() < 0.5 else m[0], good(draw, source, other))


def names_changed(draw: random.Random, source: str, other: str) -> str:
    strange = sorted(faithfulness.entities(other) - faithfulness.entities(source)) or ["nobody"]
    text = good(draw, source, other)
    for name in sorted(faithfulness.entities(source)):
        if draw.random() < 0.5:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", draw.choice(strange).capitalize(), text, flags=re.I)
    return text


def another(draw: random.Random, source: str, other: str) -> str:
    return other


def half_of_another(draw: random.Random, source: str, other: str) -> str:
    said, strange = SENTENCE.split(source), SENTENCE.split(other)
    return " ".join([*said[: -(-len(said) // 2)], *strange[len(strange) // 2 :]])


def one_sentence_more(draw: random.Random, source: str, other: str) -> str:
    said = SENTENCE.split(other)
    strange = [s for s in said if faithfulness.numbers(s) and faithfulness.entities(f"It is so, {s}")] or said
    return good(draw, source, other) + " " + draw.choice(strange)


def about_it(draw: random.Random, source: str, other: str) -> str:
    return " ".join(draw.sample(ABOUT, 4))


def again_and_again(draw: random.Random, source: str, other: str) -> str:
    said = SENTENCE.split(source)
    return " ".join(said[:2] * (-(-len(said) // 2)))


KINDS: tuple[Callable[[random.Random, str, str], str], ...] = (
    *(good, without_most, numbers_changed, names_changed, another, half_of_another, one_sentence_more),
    *(about_it, again_and_again),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, default=1000)
    args = parser.parse_args()
    sources = [text for text, _ in zip(paragraphs(), range(args.sources), strict=False)]
    out: dict[str, dict[str, float]] = {}
    for task in LIMITS:
        if task == "diverse_qa":  # which makes questions
            continue
        how = Rephrase.model_validate({"tasks": [task], "generators": [{"folder": "."}]})
        out[task] = {}
        for kind in KINDS:
            draw = random.Random(0)
            kept = 0
            for i, source in enumerate(sources):
                text = kind(draw, source, sources[i - 1])
                found = faithfulness.compute(source, text, source_tokens=len(source.encode()) // 4, tokens=len(text.encode()) // 4)
                limits = how.limits_of(task)
                inside = ((found[f], least, most) for f, (least, most) in limits.items())
                kept += all((least is None or value >= least) and (most is None or value <= most) for value, least, most in inside)
            out[task][kind.__name__] = round(kept / len(sources), 3)
    print(json.dumps({"sources": len(sources), "kept": out}))


if __name__ == "__main__":
    main()
