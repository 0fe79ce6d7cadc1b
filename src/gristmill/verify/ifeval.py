"""IFEval (arXiv 2311.07911): checkers of its 25 verifiable instructions.

Ids and kwargs are those of the benchmark's file, verdicts those of its checker (google-research, instruction_following_eval) with
its oddities: a keyword counts inside a longer word too, the `1.` of a numbered list is a sentence, and so is the last mark of a
final `!!`. On purpose four things differ. Words in kwargs are taken literally, not as regular expressions. A senseless kwarg is an
error; there a random one replaces it. Sentences follow the rules of Punkt, with short lists of words in place of its trained model.
The language is guessed by `detect_language`, the same on every run.
"""

import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from string import whitespace
from typing import Any
from unicodedata import category

from gristmill.core.errors import InputError

Check = Callable[..., bool]
CHECKS: dict[str, Check] = {}
RELATIONS = ("at least", "less than")
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
REPEAT = "combination:repeat_prompt"

# Sentences. A mark ends one at the end of a word or before what can't stand inside a word; closers belong to the sentence they close.
CLOSERS = "\"')]}\u2018\u2019\u201c\u201d\u00ab\u00bb"
OUTSIDE = rf"[;:*@({{\[!?{re.escape(CLOSERS)}]"
MARK = re.compile(rf"[.?!](?={OUTSIDE}|\Z)")
NUMERAL = re.compile(r"-?[.,]?\d[\d,.-]*")
ABBREVIATION = re.compile(  # the last kind: initials, e.g, a.m, u.s.a
    r"adm|al|apr|approx|aug|ave|blvd|capt|cf|co|col|corp|dec|dept|dr|est|etc|feb|fig|gen|gov|hon|inc|jan|jr|lt|ltd|maj|mr|mrs|ms|mt|nov|oct"
    r"|ph\.d|prof|rep|rev|sen|sept?|sgt|sr|st|vol|vs|[^\W\d_](?:\.[^\W\d_])*"
)
STARTER = re.compile(  # a word that starts a sentence even after an abbreviation
    "a|after|all|also|although|an|and|another|as|at|because|before|both|but|by|despite|during|each|even|every|finally|first|for|from|he"
    "|her|here|his|how|however|i|if|in|instead|its?|let|many|meanwhile|moreover|most|my|no|not|now|of|on|once|one|or|our|please|several|she"
    "|since|so|some|still|such|that|the|their|then|there|these|they|this|those|though|to|under|until|we|what|when|where|which|while|who|why"
    "|with|yes|your?"
)

# Words in capitals, by the Treebank rules: what stands between words, endings that are split off, words that are cut in two.
BETWEEN = re.compile(r"[\u00ab\u00bb\u2018-\u201e\u2012-\u2015`\";@#$%&?!*(){}<>[\]]|\.{2,}|--|''|[:,](?!\d)|\.(?=[])}>\"'*]*(?:\s|\Z))")
ENDING = re.compile(r"(?<=[^'\s])('(?:[sSmMdD]|ll|LL|re|RE|ve|VE)|n't|N'T)(?!\S)")
CUT_IN_TWO = re.compile(r"\b(?:CANNOT|GIMME|GONNA|GOTTA|LEMME|WANNA)\b")

# Languages. A script that one language uses decides by itself. The keys are code points >> 7.
SCRIPTS = {0x0B: "he", 0x12: "Devanagari", 0x13: "bn", 0x14: "pa", 0x15: "gu", 0x17: "ta", 0x18: "te", 0x19: "kn", 0x1A: "ml", 0x1C: "th"}
SCRIPTS |= dict.fromkeys([*range(0x05), 0x3C, 0x3D], "Latin") | dict.fromkeys(range(0x08, 0x0B), "Cyrillic")
SCRIPTS |= dict.fromkeys(range(0x0C, 0x0F), "Arabic") | dict.fromkeys(range(0x60, 0x62), "ja")
SCRIPTS |= dict.fromkeys(range(0x68, 0x140), "zh") | dict.fromkeys(range(0x158, 0x1B0), "ko")
# Script -> language -> frequent words and typical letters; where nothing speaks for any, the first one it is.
TELLING = {
    "Latin": {
        "en": "the of and to in is that it for was on are with as his they be at this have from or by not but you your we an",
        "de": "der die das und ist ein eine nicht mit von zu den dem des im auf sich auch als ich sie wir oder in es \u00f6 \u00fc \u00df",
        "es": "que de el los las en un una por con para es del se no su lo al la como m\u00e1s \u00f1 \u00bf \u00a1",
        "fi": "ja on ei se ovat oli kun tai joka mutta voi ole ne sen olla kuin jos niin \u00e4 \u00f6",
        "fr": "de le la les et un une pour avec du des dans est pas sur vous nous au ce qui que en il elle \u00e8 \u00ea \u00e0 \u00e7",
        "it": "che di il lo gli un una per con del della dei nel non si sono da in la le al come questo \u00e8 \u00e0 \u00f2 \u00ec",
        "pl": "na nie do to jest od za po przez oraz ale lub dla jak czy co \u0105 \u0119 \u0142 \u015b \u017a \u017c",
        "pt": "que de os as em um uma por com para do da no na dos das se mais ou ao seu sua \u00e3 \u00f5 \u00e7",
        "sw": "na ya wa kwa ni za katika la cha hii ili kuwa au kama hiyo yako wako sana lakini huo vya kila pia moja",
        "vi": "trong cho l\u00e0 \u0103 \u0111 \u01a1 \u01b0 \u1ea1 \u1ea3 \u1ea5 \u1ebf \u1ec1 \u1ec7 \u1ed9 \u1edd \u1edb \u1ee7",
    },
    "Cyrillic": {
        "ru": "\u044b \u044d \u0451 \u0447\u0442\u043e \u044d\u0442\u043e \u0434\u043b\u044f \u043a\u0430\u043a \u0438\u0437",
        "uk": "\u0456 \u0457 \u0454 \u0491 \u0449\u043e \u0446\u0435 \u0434\u043b\u044f \u0430\u0431\u043e \u0442\u0430",
        "bg": "\u044a \u0447\u0435 \u0442\u043e\u0432\u0430 \u0437\u0430 \u0434\u0430 \u0441\u0435 \u043e\u0442 \u0438\u043b\u0438",
    },
    "Arabic": {
        "ar": "\u0629 \u0649 \u064a \u0643 \u0623 \u0625",
        "fa": "\u06a9 \u06cc \u067e \u0686 \u0698 \u06af \u0627\u06cc\u0646 \u06a9\u0647 \u0627\u0632 \u0627\u0633\u062a",
        "ur": "\u06a9 \u06cc \u067e \u0686 \u06af \u0679 \u0688 \u0691 \u06ba \u06d2 \u06c1 \u06be",
    },
    "Devanagari": {
        "hi": "\u0939\u0948 \u0939\u0948\u0902 \u0915\u093e \u0915\u0940 \u0915\u0947 \u092e\u0947\u0902 \u0915\u094b \u0938\u0947",
        "mr": "\u0906\u0939\u0947 \u0906\u0923\u093f \u0939\u0947 \u0928\u093e\u0939\u0940 \u0915\u093f\u0902\u0935\u093e \u0933",
        "ne": "\u091b \u092f\u094b \u0939\u094b \u0939\u094b\u0938\u094d \u092a\u0928\u093f \u0935\u093e \u0917\u0930\u094d\u0928",
    },
}
LANGUAGES = {script for script in SCRIPTS.values() if script.islower()} | {language for table in TELLING.values() for language in table}
# Combining marks are no \w: what ends a word is listed.
WORD = re.compile(r"[^\s\d!-/:-@[-`{-~\u00ab\u00bb\u2000-\u206f\u0964\u0965\u060c\u061b\u061f]+")


def check_instructions(checks: Sequence[dict[str, Any]], answer: str, *, loose: bool = False, prompt: str = "") -> list[bool]:
    """Check each instruction against an answer. An empty answer follows none.

    Args:
        checks: one `{"id": .., **kwargs}` an instruction, as in the benchmark's file; a kwarg that is None counts as absent.
        answer: text written by a model: searched, never evaluated.
        loose: accept an instruction that holds with or without all asterisks, the first line, the last line.
        prompt: what `combination:repeat_prompt` wants repeated where it has no `prompt_to_repeat`.

    Raises:
        InputError: an unknown id, or a kwarg that is missing, unknown or senseless.
    """
    answers = list(dict.fromkeys(_variants(answer))) if loose else [answer]
    return [any(check(a, **kwargs) for a in answers) for check, kwargs in [_parse(c, prompt) for c in checks]]


def detect_language(text: str) -> str | None:
    """Guess the language of a text by its script, frequent words and typical letters; None for a text without letters.

    Knows ar bg bn de en es fa fi fr gu he hi it ja kn ko ml mr ne pa pl pt ru sw ta te th uk ur vi zh. In these scripts
    anything else gets the code nearest to it (English for Latin letters that tell nothing), in other scripts "other".
    """
    text = text.lower()
    letters, words = Counter(text), Counter(WORD.findall(text))
    scripts: Counter[str] = Counter()
    for letter, num in letters.items():
        script = SCRIPTS.get(ord(letter) >> 7, "other")
        if letter.isalpha() or category(letter)[0] == "M" and script != "other":  # Indic scripts combine letters and marks
            scripts[script] += num
    if not scripts:
        return None
    if scripts["ja"] * 10 > scripts["zh"]:  # Japanese mixes kana and Han
        scripts["ja"] += scripts.pop("zh", 0)
    script = max(scripts, key=scripts.__getitem__)
    scores = {code: sum(words[m] + letters[m] for m in marks.split()) for code, marks in TELLING.get(script, {script: ""}).items()}
    return max(scores, key=scores.__getitem__)


def _variants(answer: str) -> Iterator[str]:
    lines = answer.split("\n")
    for text in (answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))):
        yield from (text, text.replace("*", ""))


def _parse(check: dict[str, Any], prompt: str) -> tuple[Check, dict[str, Any]]:
    name = str(check.get("id")) if isinstance(check, dict) else ""
    if name not in CHECKS:
        raise InputError(f"The check {check!r} has no known id: use one of {', '.join(sorted(CHECKS))}.")
    kwargs = {key: value for key, value in check.items() if key != "id"}
    if name == REPEAT and prompt and kwargs.get("prompt_to_repeat") is None:
        kwargs["prompt_to_repeat"] = prompt
    return CHECKS[name], kwargs


def _instruction(name: str) -> Callable[[Check], Check]:
    """Registers a check under its id. What it is called with is validated by the names of its parameters."""

    def register(function: Check) -> Check:
        needed = list(inspect.signature(function).parameters)[1:]

        def check(answer: str, **kwargs: Any) -> bool:
            given = {key: value for key, value in kwargs.items() if value is not None}
            if wrong := sorted(set(needed) - set(given)) or sorted(set(given) - set(needed)):
                verb = "lacks" if wrong[0] in needed else "has no use for"
                raise InputError(f"The instruction {name} {verb} {', '.join(wrong)}: give {', '.join(needed) or 'its id alone'}.")
            for key, value in given.items():
                if want := _expected_value(key, value):
                    raise InputError(f"The instruction {name} has the {key} {value!r}: give {want}.")
            if given.get("nth_paragraph", 0) > given.get("num_paragraphs", 0):
                raise InputError(f"The instruction {name} has an nth_paragraph beyond num_paragraphs: give one of those there are.")
            return bool(answer.strip()) and function(answer, **given)

        CHECKS[name] = check
        return check

    return register


def _expected_value(key: str, value: Any) -> str:
    """What a kwarg should be, "" if it is that."""
    if key.endswith("relation"):
        return "" if value in RELATIONS else " or ".join(RELATIONS)
    if key == "language":
        return "" if str(value) in LANGUAGES else f"one of {' '.join(sorted(LANGUAGES))}"
    if key in ("keywords", "forbidden_words"):
        fine = isinstance(value, list | tuple) and value and all(isinstance(word, str) and word.strip() for word in value)
        return "" if fine else "a list of words"
    if key.startswith("num_") or key.endswith("frequency") or key == "nth_paragraph":
        fine = isinstance(value, int) and not isinstance(value, bool) and value >= (key == "nth_paragraph")
        return "" if fine else "a whole number"
    if not isinstance(value, str) or not value.strip():
        return "a text"
    return "one character" if key == "letter" and len(value.strip()) > 1 else ""


def _holds(num: int, relation: str, limit: int) -> bool:
    return num >= limit if relation == "at least" else num < limit


@_instruction("keywords:existence")
def _existence(answer: str, keywords: Sequence[str]) -> bool:
    return all(re.search(re.escape(word), answer, re.I) for word in keywords)


@_instruction("keywords:frequency")
def _frequency(answer: str, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(len(re.findall(re.escape(keyword.strip()), answer, re.I)), relation, frequency)


@_instruction("keywords:forbidden_words")
def _forbidden_words(answer: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", answer, re.I) for word in forbidden_words)


@_instruction("keywords:letter_frequency")
def _letter_frequency(answer: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(answer.lower().count(letter.strip().lower()), let_relation, let_frequency)


@_instruction("language:response_language")
def _response_language(answer: str, language: str) -> bool:
    return detect_language(answer) in (language, None)


@_instruction("length_constraints:number_sentences")
def _number_sentences(answer: str, num_sentences: int, relation: str) -> bool:
    return _holds(len(sentence_ends(answer)) + 1, relation, num_sentences)


@_instruction("length_constraints:number_paragraphs")
def _number_paragraphs(answer: str, num_paragraphs: int) -> bool:
    return _count_parts(answer, "***") == num_paragraphs


@_instruction("length_constraints:number_words")
def _number_words(answer: str, num_words: int, relation: str) -> bool:
    return _holds(len(re.findall(r"\w+", answer)), relation, num_words)


@_instruction("length_constraints:nth_paragraph_first_word")
def _nth_paragraph_first_word(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    # Empty paragraphs are not counted, yet they have a place in the order: so it is in the benchmark's checker.
    paragraphs = [paragraph.split() for paragraph in answer.split("\n\n")]
    if sum(map(bool, paragraphs)) != num_paragraphs or not paragraphs[nth_paragraph - 1]:
        return False
    word = paragraphs[nth_paragraph - 1][0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word, maxsplit=1)[0].lower() == first_word.lower()


@_instruction("detectable_content:number_placeholders")
def _number_placeholders(answer: str, num_placeholders: int) -> bool:
    # A placeholder runs from the first open bracket to the first closing one of its line.
    return sum("[" in piece for line in answer.split("\n") for piece in line.split("]")[:-1]) >= num_placeholders


@_instruction("detectable_content:postscript")
def _postscript(answer: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    return bool(re.search(POSTSCRIPTS.get(marker, re.escape(marker.lower())), answer.lower()))


@_instruction("detectable_format:number_bullet_lists")
def _number_bullet_lists(answer: str, num_bullets: int) -> bool:
    stars, dashes = (re.findall(rf"^[^\S\n]*{bullet}", answer, re.M) for bullet in (r"\*[^*].*", "-"))
    return len(stars) + len(dashes) == num_bullets


@_instruction("detectable_format:constrained_response")
def _constrained_response(answer: str) -> bool:
    return any(option in answer for option in OPTIONS)


@_instruction("detectable_format:number_highlighted_sections")
def _number_highlighted_sections(answer: str, num_highlights: int) -> bool:
    found = [text for pattern in (r"\*([^\n*]*)\*", r"\*\*([^\n*]*)\*\*") for text in re.findall(pattern, answer)]
    return sum(bool(text.strip()) for text in found) >= num_highlights


@_instruction("detectable_format:multiple_sections")
def _multiple_sections(answer: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", answer)) >= num_sections


@_instruction("detectable_format:json_format")
def _json_format(answer: str) -> bool:
    text = answer.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):  # the latter from thousands of open brackets
        return False
    return True


@_instruction("detectable_format:title")
def _title(answer: str) -> bool:
    for line in answer.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


@_instruction("combination:two_responses")
def _two_responses(answer: str) -> bool:
    return _count_parts(answer, "******") == 2 and len({part.strip() for part in answer.split("******") if part.strip()}) == 2


@_instruction(REPEAT)
def _repeat_prompt(answer: str, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_instruction("startend:end_checker")
def _end_checker(answer: str, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_instruction("startend:quotation")
def _quotation(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@_instruction("change_case:capital_word_frequency")
def _capital_word_frequency(answer: str, capital_frequency: int, capital_relation: str) -> bool:
    words = ENDING.sub(r" \1 ", BETWEEN.sub(" ", answer)).split()
    num = sum(word.isupper() + len(CUT_IN_TWO.findall(word)) for word in words)
    return _holds(num, capital_relation, capital_frequency)


@_instruction("change_case:english_capital")
def _english_capital(answer: str) -> bool:
    return answer.isupper() and detect_language(answer) == "en"


@_instruction("change_case:english_lowercase")
def _english_lowercase(answer: str) -> bool:
    return answer.islower() and detect_language(answer) == "en"


@_instruction("punctuation:no_comma")
def _no_comma(answer: str) -> bool:
    return "," not in answer


def _count_parts(answer: str, divider: str) -> int:
    """How many parts the divider separates; -1 if one in the middle is empty."""
    parts = [part.strip() for part in answer.split(divider)]
    return sum(map(bool, parts)) if all(parts[1:-1]) else -1


def sentence_ends(text: str) -> list[int]:
    """Sentence boundaries of a text: where each sentence but the last ends, as Punkt (Kiss and Strunk 2006) finds them.

    At most one ends in a word, whatever case follows.
    """
    words = list(re.finditer(r"\S+", text.rstrip(CLOSERS + whitespace)))
    out = []
    for match, following in zip_longest(words, words[1:]):
        word = match[0]
        ends = [mark.end() for mark in MARK.finditer(word) if following or mark.end() < len(word)]
        if ends and _ends_sentence(word[: ends[-1]], word[ends[-1] :] or following[0]):
            rest = word[ends[-1] :]
            out.append(match.end() if not rest.strip(CLOSERS + "*_") else match.start() + ends[-1])
    return out


def _ends_sentence(word: str, following: str) -> bool:
    """Whether the mark at the end of a word ends a sentence."""
    first = re.split(r"\W", following, maxsplit=1)[0]
    stem = re.split(OUTSIDE, word)[-1].removesuffix(".").lower()
    if word.endswith(".."):
        return first[:1].isupper()
    if word.endswith(".") and NUMERAL.fullmatch(stem):
        return not first.islower()
    if word.endswith(".") and ABBREVIATION.fullmatch(stem):
        return first[:1].isupper() and STARTER.fullmatch(first.lower()) is not None
    return True
