"""JSON extraction and JSON-schema validation. Both texts come from models, so neither is trusted."""

import json
from typing import Any

from gristmill.core.response_text import answer_text, code_blocks

# Keywords by which a schema could fetch something, or take forever.
UNSAFE = ("$ref", "$dynamicRef", "$recursiveRef", "pattern", "patternProperties", "format")
MAX_STARTS = 50  # places at which JSON may begin that are tried
MAX_JSON_CHARS = 100_000  # of JSON that is looked at


def extract_json(text: str) -> Any:
    """Extract the JSON object or array of an answer: in a fenced block, between its outermost braces, or the longest; None for none."""
    text = answer_text(text)
    for source in (*(block.code for block in code_blocks(text)), text):
        starts = [place for bracket in "{[" if (place := source.find(bracket)) >= 0]
        if not starts:
            continue
        start = min(starts)
        end = max(source.rfind("}"), source.rfind("]"))
        if end < start or end - start > MAX_JSON_CHARS:
            continue
        if found := _longest(source, start, end + 1):
            return found[0]
    return None


def _longest(source: str, start: int, end: int) -> tuple[Any] | None:
    """The whole JSON between two places, else the longest piece of it: text with braces of its own may stand around it."""
    decoder = json.JSONDecoder(parse_constant=_no_json)
    longest, found, at = 0, None, start
    for _ in range(MAX_STARTS):
        try:
            value, stop = decoder.raw_decode(source, at)
        except (ValueError, RecursionError):
            stop = at + 1
        else:
            if stop - at > longest:
                longest, found = stop - at, (value,)
        places = [place for bracket in "{[" if (place := source.find(bracket, stop, end)) >= 0]
        if not places:
            break
        at = min(places)
    return found


def _no_json(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def schema_error(schema: Any) -> str:
    """Why a schema cannot be used, "" where it can."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    try:
        if any(f'"{word}"' in json.dumps(schema) for word in UNSAFE):
            return f"it uses one of {', '.join(UNSAFE)}"
        Draft202012Validator.check_schema(schema)
    except SchemaError as e:
        return e.message
    except (RecursionError, ArithmeticError, ValueError, TypeError) as e:
        return str(e) or type(e).__name__
    return ""


def validation_error(value: Any, schema: dict[str, Any]) -> str:
    """The first way in which a value does not fit a schema that `schema_error` has passed; "" where it fits."""
    from jsonschema import Draft202012Validator

    try:
        error = next(iter(Draft202012Validator(schema).iter_errors(value)), None)
    except (RecursionError, ArithmeticError, ValueError, TypeError) as e:
        return f"it cannot be checked ({type(e).__name__})"
    return "" if error is None else error.message
