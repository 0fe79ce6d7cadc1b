"""Thinking, code blocks and programs in the texts of models."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.core.response_text import ReasoningParser, answer_text, code_blocks, extract_code, has_open_thinking, strip_thinking


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5", "5"),
        ("<think>4?</think>\n\n5", "5"),
        ("4? No.\n</think>\n5", "5"),
        ("<think>it may be 4", ""),
        ("Sure. <Thinking kind='long'>4?</Thinking>5", "Sure. 5"),
        ("5 <thought>check", "5 "),
        ("<think>a <think>b</think> c</think>5", "5"),
        ("[THINK]4?[/THINK]5", "5"),
        ("<|begin_of_thought|>4<|end_of_thought|>\n5", "5"),
        ("\u25c1think\u25b74\u25c1/think\u25b75", "5"),
        ("<|channel|>analysis<|message|>4?<|end|><|start|>assistant<|channel|>final<|message|>5", "5"),
        ("<think>```python\nopen(\n</think>\n```python\nx = 5\n```", "```python\nx = 5\n```"),
        ("The tag `<think>` opens it.", "The tag `<think>` opens it."),
        ("text.split('</think>')[1]", "text.split('</think>')[1]"),
        ("```xml\n<think>\n</think>\n```\n5", "```xml\n<think>\n</think>\n```\n5"),
        ("I [think] so, 1 < 2", "I [think] so, 1 < 2"),
        ("<think />\n5", "\n5"),
        ("analysis4?assistantfinal5", "5"),
        ("<unused94>thought\n4?<unused95>5", "5"),
        ("<|channel>thought\n4?<channel|>5", "5"),
        ("<mm:think>4?</mm:think>5", "5"),
        ("<internal_thoughts>4?</internal_thoughts>5", "5"),
        ("<think>4?</ think>5", "5"),
        ('<details type="reasoning" done="true">\n4?\n</details>\n5', "\n5"),
        ("<details>why</details>5", "<details>why</details>5"),
        ("<think>4?<\\/think>5", "5"),
    ],
)
def test_strip_thinking(text: str, said: str) -> None:
    assert strip_thinking(text) == said


@pytest.mark.parametrize(
    ("begun", "text", "thought", "said"),
    [
        (None, "<think>\n4?\n</think>\n\n5", "\n4?\n", "\n\n5"),
        (None, " [THINK]4?[/THINK]5", "4?", "5"),
        (None, "5, <think>not 4</think>", "", "5, <think>not 4</think>"),
        (None, "4?</think>5", "", "4?</think>5"),
        (None, "< 5", "", "< 5"),
        (None, "<think>4", "4", ""),
        (None, "<|channel>thought\n4?<channel|>5", "\n4?", "5"),
        (True, "4?</think>5", "4?", "5"),
        (True, "<think>4?</think>5 <think>6</think>", "4?", "5 <think>6</think>"),
        (True, "4", "4", ""),
        (True, "`</think>` ends it</think>5", "`</think>` ends it", "5"),
        (False, "<think>4</think>5", "", "<think>4</think>5"),
    ],
)
def test_thinking_is_told_apart(begun: bool | None, text: str, thought: str, said: str) -> None:
    assert ReasoningParser(begun).add(text, last=True) == (thought, said)


PIECES = ["<think>", "</think>", "`", '"', "<", "</", "<|", ">", "think", "[THINK]", " ", "\n", "word ", "```"]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.sampled_from([None, True, False]), st.data())
def test_thinking_that_comes_in_pieces_is_the_same(text: str, begun: bool | None, data: st.DataObject) -> None:
    parser, thought, said, at = ReasoningParser(begun), "", "", 0
    while at < len(text):
        end = at + data.draw(st.integers(1, 6))
        told = parser.add(text[at:end], last=end >= len(text))
        thought, said, at = thought + told[0], said + told[1], end
    assert (thought, said) == ReasoningParser(begun).add(text, last=True)


@pytest.mark.parametrize(
    ("text", "at_end", "begun"),
    [
        ("Assistant\n<think>\n", True, True),
        ("Assistant\n<think>\n\n</think>\n\n", True, False),
        ("What is <think>?\nAssistant\n", True, None),
        ("<think>4", False, True),
        ("<think>4</think>5", False, False),
        ("5", False, None),
    ],
)
def test_where_a_text_stops(text: str, at_end: bool, begun: bool | None) -> None:
    assert has_open_thinking(text, at_end=at_end) is begun


@pytest.mark.parametrize(
    "text",
    [
        "<think>4</think><answer>5</answer>",
        "<answer>4</answer>, no: <answer>5</answer>.",
        "<final_answer>5",
        "So\n<solution>5</solution>",
        "[BEGIN FINAL RESPONSE]5[END FINAL RESPONSE]",
    ],
)
def test_the_answer_is_between_the_last_answer_tags(text: str) -> None:
    assert answer_text(text) == "5"


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("", []),
        ("a ``` b", []),
        ("~~~ Python\nx\n~~~", [("python", "x\n")]),
        ("> ```\n> x\n> ```\nhi", [("", "x\n")]),
        ("Here: ```js\nx\n```", [("js", "x\n")]),
        ("2. ```py\n   if x:\n       y\n   ```\nhi", [("py", "if x:\n    y\n")]),
        ("- a\n\t```\n\tx\n\t\ty\n\t```", [("", "x\n\ty\n")]),
        ("````markdown\n```python\nx\n```\n````\nhi", [("markdown", "```python\nx\n```\n")]),
        ("```python\nx\n```bash\nls\n```", [("python", "x\n"), ("bash", "ls\n")]),
        ("```text\nx\n``` and so on", [("text", "x\n")]),
        ("```\nx", [("", "x")]),
    ],
)
def test_code_blocks(text: str, blocks: list[tuple[str, str]]) -> None:
    assert [(block.language, block.code) for block in code_blocks(text)] == blocks


@given(st.lists(st.sampled_from(["```", "~~~", "python", "\n", "'''", "x", " ", "> ", "1. ", "`", "<think>", "</think>"]), max_size=40))
def test_any_text_has_blocks_in_order_and_an_answer(pieces: list[str]) -> None:
    text = "".join(pieces)
    spans = [end for block in code_blocks(text) for end in (block.start, block.end)]
    assert spans == sorted(spans) and (not spans or spans[-1] <= len(text))
    extract_code(text, "f(1)")
    assert len(answer_text(text)) <= len(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5<|im_end|>\n<|im_start|>user\n6?<|im_end|>\n<|im_start|>assistant\n6", "5"),
        ("<|begin_of_text|>5</s>", "5"),
        ("Write `<|im_end|>` at the end.", "Write `<|im_end|>` at the end."),
        ("```\n5<|im_end|>\n```\n6", "```\n5<|im_end|>\n```\n6"),
        ("```python\nx = 5\n<|eot_id|>", "```python\nx = 5\n"),
        ("a < 5, <s>4</s>", "a < 5, <s>4</s>"),
        ("<|START_RESPONSE|>5<|END_RESPONSE|>", "5"),
    ],
)
def test_an_answer_is_of_one_turn(text: str, answer: str) -> None:
    assert answer_text(text) == answer


PROGRAM = "def f(x):\n    return x + 1\n"
BLOCK = f"```python\n{PROGRAM}```\n"


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("def f(x): return x", "def f(x): return x"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nor\n```python\nx = 2\n```", "x = 2\n"),
        ("```python3.11 title\nx = 1\n```\ntext\n```c++\nx = 2\n```", "x = 1\n"),
        ("```js\nlet a\n```\n", "let a\n"),
        ("```py \r\nx = 1\n```", "x = 1\n"),
        ("  ```python\n  x = 1\n  ```", "x = 1\n"),
        ("```python\nprint('```')\nx = 1\n```", "print('```')\nx = 1\n"),
        ("```python\nx = 1```", "x = 1"),
        ("```python\nx = 1", "x = 1"),
        ("```python\nx = 1\n```\nor\n```python\nx = 2", "x = 2"),
        ("Say `def f(x): return x`.", "def f(x): return x"),
        ("", ""),
    ],
)
def test_extract_code(answer: str, program: str) -> None:
    assert extract_code(answer) == program


@pytest.mark.parametrize(
    "answer",
    [
        f"{BLOCK}Usage:\n```python\nprint(f(1))\n```",
        f"{BLOCK}Usage:\n```python\nvalue = f(1)\nprint(value)\n```",
        f"{BLOCK}Output:\n```\n2\n```",
        f"{BLOCK}Run:\n```bash\npython a.py\n```\n```text\nanswer = 2\n```",
        f"{BLOCK}A check:\n```python\ndef test_f():\n    assert f(1) == 3\ntest_f()\n```",
        f"{BLOCK}In the shell:\n```python\n>>> f(1)\n2\n```",
        f"```python\ndef f(x): return x\n```\nBetter:\n{BLOCK}",
        f"If\n```python\nx = 1\n```\nthen\n{BLOCK}",
        f"```bash\npip install x\n```\n```\n{PROGRAM}```",
        f"<think>\n```python\ndef f(x): return 0\n```\n</think>\n{BLOCK}",
        f"~~~python\n{PROGRAM}~~~",
        "1. So:\n\n   ```python\n   def f(x):\n       return x + 1\n   ```\n2. Done.",
        f"Sure, here it is:\n\n{PROGRAM}\nIt adds one.",
        f"Sure, here it is:\n\n{PROGRAM}\nExample: f(1) gives 2.",
        f"{PROGRAM}\nThis function adds one.",
        f"{PROGRAM}\nOutput:\n2",
        f"\ufeff```python\n{PROGRAM}```",
        f"\u00a0```python\n{PROGRAM}\u00a0```\nOutput:\n\u00a0```\n2\n```",
        f"{BLOCK}Tests:\n```python\nfrom solution import f\nclass T(TestCase):\n    def test(self): self.assertEqual(f(1), 2)\n```",
        f"<pre><code class='language-python'>{PROGRAM}</code></pre>",
        f"[PYTHON]\n{PROGRAM}[/PYTHON]\n[TESTS]\nassert f(1) == 3\n[/TESTS]",
        f"{PROGRAM}```",
        f"{PROGRAM}```\nIt adds one.",
        f"```python\nprint(f(1))\n```\n{PROGRAM}",
        f"<python>\n{PROGRAM}</python>",
        f"\\begin{{lstlisting}}[language=Python]\n{PROGRAM}\\end{{lstlisting}}",
        f"'''python\n{PROGRAM}'''",
        f"```python {PROGRAM}```",
        f"````markdown\n# Answer\n{BLOCK}````",
        json.dumps({"why": "simple", "code": PROGRAM}),
        f"```json\n{json.dumps({'code': PROGRAM})}\n```",
        f"```python\n{PROGRAM.replace('    ', chr(0xA0) * 4)}```",
        f"\ufeff{PROGRAM}",
        f"<|python_tag|>{PROGRAM}<|eom_id|>",
    ],
)
def test_the_program_is_found_among_other_blocks(answer: str) -> None:
    assert extract_code(answer, "assert f(1) == 2").strip() == PROGRAM.rstrip()


def test_tags_of_an_answer_within_a_program_are_text() -> None:
    program = 'def f(x):\n    return re.findall(r"<answer>(.*?)</answer>", x)\n'
    assert extract_code(f"```python\n{program}```", "f(1)") == program
    assert answer_text(f"<answer>\n```python\n{program}```\n</answer>") == f"\n```python\n{program}```\n"


def test_a_program_in_pieces_is_put_together() -> None:
    pieces = ["import math", "def g(x): return math.pi * x", "def f(x): return g(x)", "f(2)"]
    answer = "\n".join(f"```python\n{piece}\n```" for piece in pieces)
    assert extract_code(answer) == "import math\n\ndef g(x): return math.pi * x\n\ndef f(x): return g(x)\n"
    assert extract_code("```python\ndef g(x): return x\n```\n```python\ndef f(x): return x\n```", "assert f(g(1))").count("def") == 2


@pytest.mark.parametrize("quotes", ["'''", '"""'])
@pytest.mark.parametrize("indent", ["", "  ", "    "])
def test_a_fence_in_a_string_of_the_program_does_not_end_it(quotes: str, indent: str) -> None:
    string = f"{indent}s = {quotes}\n{indent}```python\n{indent}f(1)\n{indent}```\n{indent}{quotes}\n"
    program = f"def f(x):\n{string}    return x\n" if indent else f"{string}def f(x):\n    return x\n"
    assert extract_code(f"```python\n{program}```\nDone.") == program
    assert extract_code(program) == program


def test_hostile_texts_are_read() -> None:
    for text in (
        "```\n" * 4_000,
        "``` " * 10_000,
        " " * 40_000 + "```",
        "```" + "x" * 40_000,
        "```python\n'''\n" * 2_000,
        "```python\n" + "'" * 20_000,
        "```python\n'''" + "\\" * 40_000,
        "<think>\n```\n```\n" * 1_000,
        "`<think>" * 4_000,
        "from x import (\n" * 2_000,
        "for " * 8_000,
        "def f(" * 6_000,
        "x\n" + " " * 40_000,
        "```\n<|im_end|>\n```\n" * 2_000,
        "```\n" + "<|im_end|>" * 4_000 + "\n```",
        "<python>" * 4_000,
    ):
        answer_text(text)
        extract_code(text, text)
        extract_code(f"```python\n{text}\n```\n```python\nx = 1\n```")
