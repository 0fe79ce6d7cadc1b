"""Results of judged benchmarks as lines and as a page: scores with intervals, replies that cannot be read, the lowest grades."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gristmill.core.io import write_text
from gristmill.data.rows import read_records
from gristmill.report.markup import Markup, document, el, table
from gristmill.report.sample_files import studio_link

NUM_SHOWN = 8  # samples of a kind on the page
MAX_CHARACTERS = 2000  # of a text on the page
TEXTS = ("question", "instruction", "messages", "answer", "output_1", "output_2", "first", "second", "baseline", "reply", "replies")
UNREAD = {  # what becomes of a reply that cannot be read
    "mt-bench": "is left out of the means",
    "arena-hard": "takes its whole question out",
    "alpaca-eval": "is left out of the win rates",
    "agreement": "counts as wrong",
    "rewards": "counts as a tie",
}
Row = tuple[str, Mapping[str, Any] | None, int, str]  # name, score, digits, what stands behind it


def score_rows(results: Mapping[str, Any]) -> Iterator[Row]:
    """A benchmark's figures, one after the other."""

    def row(name: str, score: Mapping[str, Any], digits: int, more: str = "") -> Row:
        return " ".join(name.split()), score, digits, more  # a name may be a file's

    scores = results["scores"]
    match results["benchmark"]:
        case "mt-bench":
            yield row("MT-Bench", scores["overall"], 2)
            for turn in scores["turns"]:
                yield row(f"turn {turn}", scores["turns"][turn], 2)
            for category, score in scores["categories"].items():
                yield row(category, score, 2)
            yield row("as FastChat reads the replies", scores["fastchat"], 2, f"{scores['fastchat']['read_otherwise']} read otherwise")
            if pairs := results.get("pairs"):
                for name, score in {"overall": pairs["overall"], **{f"turn {t}": s for t, s in pairs["turns"].items()}}.items():
                    counts = f"wins {score['wins']}, ties {score['ties']}, losses {score['losses']}"
                    yield row(f"against {pairs['baseline']}, {name}", score, 3, counts)
                yield row("first place", pairs["first_place"], 3)
        case "arena-hard":
            for category, score in scores.items():
                yield row(category, score, 1, f"dropped {score['dropped']}")
                if score["style_controlled"]:
                    yield row(f"{category}, style controlled", score["style_controlled"], 1)
            yield row("first place", results["first_place"], 3)
        case "alpaca-eval":
            yield row("win rate", scores["win_rate"], 2)
            yield row(scores["length_controlled"]["name"], scores["length_controlled"], 2)
        case "agreement":
            for name in ("agreement", "decided", "single_order", "consistent", "first_place", "kappa"):
                yield row(name.replace("_", " "), scores[name], 3)
            for name in ("judge", "people", "difference"):
                yield row(f"longer answer, {name}", scores["length"][name], 3)
            for name, score in scores["subsets"].items():
                yield row(name, score, 3)
            if people := scores.get("people"):
                kappas = "  ".join("none" if k is None else f"{k:.3f}" for k in people["kappas"])
                yield "people among themselves", None, 3, f"alpha {people['alpha']}  kappas {kappas}"
        case "rewards":
            for name, found in scores.items():
                overall = found["overall"]
                yield row(name, overall if isinstance(overall, Mapping) else {"mean": overall}, 4)
                named = ("with_priors", "as_leaderboard", "hard", "normal", "easy")
                rows = {part: {"mean": found[part]} for part in named if found.get(part) is not None}
                rows |= {c: {"mean": mean} for c, mean in found.get("categories", {}).items()}
                rows |= {**found.get("domains", {}), **found.get("subsets", {})}
                for part, score in rows.items():
                    yield row(part, score, 4)


def judged_text(results: Mapping[str, Any]) -> str:
    """The results as lines for a terminal, notes last."""
    lines = []
    for name, score, digits, more in score_rows(results):
        cells = [name.ljust(34), "" if score is None else _figure(score, digits), _num(score), more]
        lines.append("  ".join([f"{cells[0]} {cells[1]}".rstrip(), *filter(None, cells[2:])]))
    return "\n".join([*lines, _unreadable(results), *(f"note: {note}" for note in results["notes"])])


def _figure(score: Mapping[str, Any], digits: int) -> str:
    if score.get("mean") is None or score.get("n") == 0:
        return "none"
    low, high = score.get("ci95") or (None, None)
    return f"{score['mean']:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if low is not None else "")


def _num(score: Mapping[str, Any] | None) -> str:
    return f"n {score['n']:,}" if score and score.get("n") else ""


def _unreadable(results: Mapping[str, Any]) -> str:
    counts = results["verdicts"]
    return f"unreadable verdicts: {counts['unreadable']} of {counts['replies']} replies; failed calls: {results['failed_calls']}"


# ---- the page ----


def write_judged_page(folder: Path, results: Mapping[str, Any], samples: Path) -> Path:
    """Write `report.html` into a run's folder, from its results and its file of samples. Returns its path."""
    judge = f" judged by {results['judge']}" if results["judge"] else ""
    title = f"{results['benchmark']}: {results['model'] or 'the judge itself'}{judge}"
    given = {name.replace("_", " "): value for name, value in results["settings"].items() if value is not None and value is not False}
    settings = [name if value is True else f"{name} {value}" for name, value in given.items()]
    if results["settings"]["limit"] is not None:
        settings.append("the first questions of each category alone: no published figure")
    heading = [el("p", "gristmill judge", class_="eyebrow"), el("h1", title), el("p", "; ".join(settings), class_="soft")]
    rows = [[name, "" if one is None else _figure(one, digits), _num(one), more] for name, one, digits, more in score_rows(results)]
    parts: list[Markup] = [el("h2", "Scores"), table(["", "score, 95 % interval", "n", ""], rows)]
    told = [f"{_unreadable(results)}; what cannot be read {UNREAD[results['benchmark']]}", *results["notes"]]
    parts += [el("h2", "What to know"), el("ul", [el("li", one) for one in told], class_="lines")]
    found = list(enumerate(read_records(samples) if samples.stat().st_size else []))
    unread = [one for one in found if _is_unread(one[1])]
    graded = sorted((one for one in found if isinstance(one[1].get("score"), int | float)), key=lambda one: one[1]["score"])
    parts += [_samples(f"replies that cannot be read: {len(unread):,} samples", unread, samples.name)] if unread else []
    parts += [_samples("the lowest grades", graded, samples.name)] if graded else []
    path = folder / "report.html"
    write_text(path, document(f"gristmill: {results['benchmark']}", el("header", heading, class_="top"), el("main", parts)))
    return path


def _is_unread(row: Mapping[str, Any]) -> bool:
    """Whether a reply to it is there, and its verdict is not."""
    read = row.get("verdicts", [row.get("score", row.get("preference", row.get("verdict", "")))])
    said = row.get("replies", [row.get("reply")])
    return any(one in (None, "unparsed") for one in read) and any(one is not None for one in said)


def _samples(title: str, rows: Sequence[tuple[int, Mapping[str, Any]]], file: str) -> Markup:
    """The first of some samples, each with its place in their file."""
    shown = [_sample(row, studio_link(file, place)) for place, row in rows[:NUM_SHOWN]]
    return el("details", el("summary", title), shown, class_="task")


def _sample(row: Mapping[str, Any], link: Markup) -> Markup:
    facts = [f"{key} {value}" for key, value in row.items() if key not in TEXTS and isinstance(value, str | int | float | None)]
    turns = [(key, text) for key in TEXTS for text in _texts(row.get(key, ()))]
    shown = [el("div", el("span", who, class_="who"), el("div", said, class_="said"), class_="turn") for who, said in turns]
    return el("div", el("p", [el("span", fact, class_="chip") for fact in facts], link, class_="lineage"), shown, class_="sample")


def _texts(value: Any) -> Iterator[str]:
    """Texts of a field: itself, of a list its members, of messages what they say."""
    if isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, Mapping):
        yield from _texts(value.get("content", ()))
    else:
        text = "the call failed" if value is None else str(value)
        yield text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} [..]"
