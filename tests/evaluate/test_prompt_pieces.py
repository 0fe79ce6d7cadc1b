"""Templates of task files: values, texts, and what they may not do."""

from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.evaluate.prompt_pieces import hellaswag_clean, piece, text_piece

DOC: dict[str, Any] = {"question": " Why? ", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "key": "B", "n": 0, "A b": "x; y"}


@pytest.mark.parametrize(
    ("template", "value"),
    [
        ("{{choices.text}}", ["a", "b"]),
        ("{{choices.label.index(key)}}", 1),
        ("n", 0),
        ("Q: {{question.strip()}}\n", "Q: Why?\n"),
        ("{{row['A b'].split('; ') + [key] * 2}}", ["x", "y", "B", "B"]),
        ("{{'x' if other is defined else 'y'}}", "y"),
        ("{% for one in choices.text %}{{one}}{% endfor %}", "ab"),
        ("{{choices.text}} {{key}}", "['a', 'b'] B"),
    ],
)
def test_values(template: str, value: Any) -> None:
    assert piece(template, DOC) == value


@pytest.mark.parametrize(
    "template",
    [
        "{{other}}",
        "{{choices.text[9]}}",
        "{{'a' * 9999999999}}",
        "{{10 ** 100000}}",
        "{{'%99999999d' % 1}}",
        "{{'{:>99999999}'.format(1)}}",
        "{{question.__class__}}",
        "{{question.encode()}}",
        "{{choices.text.append('c')}}",
        "{{range(9)}}",
        "{% macro m() %}{% endmacro %}",
        "{% include 'x' %}",
        "{% for a in choices.text %}{% for b in choices.text %}{% for c in choices.text %}{% endfor %}{% endfor %}{% endfor %}",
        "{{",
        "{{" + "x" * 70000,
    ],
)
def test_what_cannot_be_used_is_one_sentence(template: str) -> None:
    with pytest.raises(InputError, match=r"^(The template|A template)") as error:
        piece(template, DOC)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_hellaswags_marks() -> None:
    assert hellaswag_clean(" [header] How to mill [title] Grind [substeps] it  fine ") == " How to mill. Grind it fine"
    assert text_piece("{{['[x] a']|map('hellaswag_clean')|first}}", DOC) == " a"
