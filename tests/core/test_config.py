"""The recipe: a frozen surface, errors that name the right key, paths, and a round trip through YAML."""

import os
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

import gristmill
from gristmill.core.config import MAX_YAML_BYTES, Recipe, check, dump, find_recipe, load, read
from gristmill.core.errors import InputError
from gristmill.curate.blend.blend import Blend
from gristmill.curate.recipe import Curation
from gristmill.train.settings import training_section
from gristmill.workflows.alignment.recipe import CONTROLS, AlignmentRecipe, Evaluate, Safety
from gristmill.workflows.compress.recipe import CompressionRecipe
from gristmill.workflows.dataset.recipe import DatasetRecipe
from gristmill.workflows.reasoning.recipe import ReasoningRecipe
from gristmill.workflows.rl.recipe import RlRecipe

# Every key a recipe may have. A change here is a change of what users have written down: think twice, then edit.
TRAINING = (
    "optimizer lr muon_lr schedule warmup_ratio warmup_steps min_lr_ratio steps epochs batch_size micro_batch_tokens "
    "checkpoint_activations compile weight_decay clip precision lora"
)
PREFERENCE = f"{TRAINING} loss beta eta label_smoothing sft_weight logprobs num_prompts num_pairs temperatures keep_chosen"
ANSWERS = "samples temperatures max_tokens"
JUDGING = (
    "reward llm keep keep_chosen max_per_prompt max_judged_per_prompt max_per_task max_per_topic min_votes max_pairs_per_prompt "
    "max_pairs_per_task min_gap verified_gap near_duplicates max_repetition max_length_difference repair"
)
GENERATOR = "base_url model folder checkpoint weight rounds kind api_key_env api_key_file price_in price_out logprobs fields extra_body"
SURFACE = {
    "": (
        "kind name world model chat_format seed rounds rpo_iterations control threads device data generators calls templates topics "
        "pipelines probe answers engine judging collapse alarms evaluate safety people check "
        "demonstration_sft reward code_sft general_sft dpo rpo"
    ),
    "data": (
        "demonstrations ratings prompts evaluation validation num_demonstrations num_rated_prompts num_prompts num_evaluation "
        "num_held_out_ratings"
    ),
    "calls": "concurrency timeout retries patience",
    "topics": "macro subtopics combine broad own file",
    "probe": "num_prompts min_usable fallback",
    "answers": ANSWERS,
    "engine": "max_batch precision",
    "judging": f"{JUDGING} max_code_per_task max_prompts_per_task code_share",
    "collapse": "tokens stop",
    "alarms": "min_steps",
    "demonstration_sft": TRAINING,
    "reward": TRAINING,
    "code_sft": TRAINING,
    "general_sft": TRAINING,
    "dpo": PREFERENCE,
    "rpo": PREFERENCE,
}
PRETRAINING = (
    "kind world documents weights held_out model preset tokenizer chat_format tokens seed batch_tokens batch_size "
    "micro_batch_tokens checkpoint_activations compile "
    "optimizer lr muon_lr schedule warmup_ratio warmup_steps min_lr_ratio weight_decay precision device"
)
SHIPPED = sorted((Path(gristmill.__file__).parent / "recipes").glob("*.yaml"))


def keys_of(section: type[BaseModel], prefix: str = "") -> dict[str, set[str]]:
    """Section name -> its keys, sections of sections included."""
    surface = {prefix: set(section.model_fields)}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            surface |= keys_of(field.annotation, f"{prefix}.{name}".strip("."))
    return surface


def write(folder: Path, values: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_surface_is_frozen() -> None:
    pipelines = dict.fromkeys(("pipelines", "probe.fallback"), " ".join(PIPELINES))
    assert keys_of(AlignmentRecipe) == {name: set(keys.split()) for name, keys in (SURFACE | pipelines).items()}
    assert " ".join(Evaluate.model_fields) == "tasks data when limit num_fewshot seed chat subsets"
    guard = "guard guard_model guard_key_env guard_logprobs taxonomy caution"
    assert " ".join(Safety.model_fields) == f"rows data canaries when limit attacks {guard} system max_tokens"
    assert CONTROLS == ("unfiltered", "random-filter", "reward-only", "human-only", "replace")


def test_pretraining_surface_is_frozen() -> None:
    from gristmill.workflows.pretrain import Pretraining

    assert keys_of(Pretraining) == {"": set(PRETRAINING.split())}


DATASET = """kind name seed generators chat_format device context templates calls topics documents prompts entities pipelines turn dialogues
answers judging near_duplicates licence"""
PIPELINES = {
    "open_qa": "questions revisions",
    "writing": "kinds kinds_per_topic own tasks revisions",
    "closed_qa": "questions",
    "math": "levels topics subtopics problems forms own",
    "python": "topics subtopics problems levels own",
    "instructions": "prompts max_constraints whole_talk revision forms",
    "two_turn": "prompts",
    "by_task": "tasks prompts max_tokens",
    "from_file": "half limit",
    "topic_following": "dialogues turns",
    "incapable": "lacks tasks",
    "document_qa": "questions",
    "tools": "functions requests topics",
    "genetic": "colonies generations births seeds",
}


def test_a_run_of_an_earlier_version_knows_no_key_that_came_later() -> None:
    from gristmill.judge.settings import Judging, Repair
    from gristmill.synth.pipelines.instructions import Instructions

    assert not {"repair", "max_repetition", "max_length_difference"} & Judging().model_dump().keys()
    assert Judging(repair=Repair(), max_repetition=0.5).model_dump(mode="json")["repair"]["max_per_instruction"] == 55
    assert "forms" not in Instructions().model_dump() and Instructions(forms=1).model_dump()["forms"] == 1
    recipe = AlignmentRecipe(world="miniature")
    old = recipe.model_dump(mode="json")
    assert not recipe.changed(old) and "repair" not in dump(recipe)


def test_dataset_surface_is_frozen() -> None:
    from gristmill.synth.registry import Pipelines
    from gristmill.workflows.dataset.recipe import DatasetRecipe

    assert set(DatasetRecipe.model_fields) == set(DATASET.split())
    found = {name: set(get_args(field.annotation)[0].model_fields) for name, field in Pipelines.model_fields.items()}
    assert found == {name: set(keys.split()) for name, keys in PIPELINES.items()}


def test_shipped_recipes_load() -> None:
    from gristmill.core.config import COMMANDS, find_recipe, read
    from gristmill.curate.recipe import Curation
    from gristmill.workflows.compress.recipe import CompressionRecipe
    from gristmill.workflows.dataset.recipe import DatasetRecipe
    from gristmill.workflows.pretrain import Pretraining
    from gristmill.workflows.reasoning.recipe import ReasoningRecipe
    from gristmill.workflows.rl.recipe import RlRecipe

    kinds = {"alignment": AlignmentRecipe, "dataset": DatasetRecipe, "curation": Curation, "pretraining": Pretraining, "rl": RlRecipe}
    kinds["reasoning"] = ReasoningRecipe
    kinds["compress"] = CompressionRecipe
    assert {read(path)["kind"] for path in SHIPPED} == set(kinds) < set(COMMANDS)
    for path in SHIPPED:
        kind = read(path)["kind"]
        assert find_recipe(path.stem, kind) == path
        load(path, kinds[kind])
    assert find_recipe("miniature", "compress").stem == "miniature-compress", "a name without the kind at its end"


@pytest.mark.parametrize(
    ("values", "unknown", "nearest"),
    [
        ({"world": "miniature", "round": 3}, "round", "rounds"),
        ({"world": "miniature", "judgeing": {}}, "judgeing", "judging"),
        ({"world": "miniature", "judging": {"max_per_tsk": 5}}, "judging.max_per_tsk", "max_per_task"),
        ({"world": "miniature", "dpo": {"lr": 1e-4, "steps": 5, "betta": 0.1}}, "dpo.betta", "beta"),
        ({"world": "miniature", "data": {"demonstration": "a.jsonl"}}, "data.demonstration", "demonstrations"),
    ],
)
def test_an_unknown_key_names_the_nearest(values: dict[str, Any], unknown: str, nearest: str) -> None:
    with pytest.raises(InputError) as caught:
        check(AlignmentRecipe, values)
    assert repr(unknown) in str(caught.value) and repr(nearest) in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"judging": {"quota": 5}}, "'judging.quota': it is called 'max_per_task' now"),
        ({"responses": {}}, "'responses': it is called 'answers' now"),
        ({"writing": {}}, "templates, topics and pipelines stand in the recipe itself now"),
    ],
)
def test_a_key_of_an_earlier_version_names_the_new_one(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check(AlignmentRecipe, {"world": "miniature", **values})


def test_sections_mean_the_same_in_every_kind() -> None:
    from gristmill.generation.settings import GeneratorSettings
    from gristmill.judge.settings import Judging
    from gristmill.workflows.dataset.recipe import Answers, DatasetRecipe

    assert set(Judging.model_fields) == set(JUDGING.split()) and set(GeneratorSettings.model_fields) == set(GENERATOR.split())
    assert set(Answers.model_fields) == set(ANSWERS.split())
    shared = DatasetRecipe.model_fields.keys() & AlignmentRecipe.model_fields.keys()
    assert {"generators", "calls", "templates", "topics", "pipelines", "answers", "judging", "device"} <= shared


@pytest.mark.parametrize("name", ["nowhere", "nowhere.yaml", "./miniature", "recipes/miniature", "domain"])
def test_what_is_no_recipe_of_the_kind_says_what_would_be(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gristmill.core.config import find_recipe

    monkeypatch.chdir(tmp_path)
    (tmp_path / "miniature").mkdir()  # a folder of the name of a recipe is no recipe
    assert find_recipe("miniature", "alignment").name == "miniature.yaml"
    words = (
        "use `gristmill synth domain`"
        if name == "domain"
        else "check the path"
        if name.endswith("yaml")
        else r"recipes \(miniature, real\)"
    )
    with pytest.raises(InputError, match=words):
        find_recipe(name, "alignment")


def test_a_file_of_another_kind_names_its_command(tmp_path: Path) -> None:
    path = write(tmp_path, {"kind": "dataset", "name": "mine"})
    with pytest.raises(InputError, match="is a recipe of the kind 'dataset', and 'alignment' is needed: use `gristmill synth"):
        load(path, AlignmentRecipe)


def test_paths_of_overrides_are_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gristmill.curate.recipe import Curation

    folder = tmp_path / "recipes"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    step = {"step": "decontaminate", "benchmarks": ["test.jsonl"]}
    path = write(folder, {"inputs": ["texts/*.txt"], "steps": [step]})
    loaded = load(path, Curation, {"workers": 1})
    assert loaded.inputs == [str(folder / "texts/*.txt")] and loaded.workers == 1
    loaded = load(path, Curation, {"inputs": ["here"]})
    assert loaded.inputs == ["here"] and loaded.steps[0].benchmarks == [folder / "test.jsonl"]  # type: ignore[union-attr]


def test_a_key_like_no_other_lists_the_keys() -> None:
    with pytest.raises(InputError) as caught:
        check(AlignmentRecipe, {"world": "miniature", "engine": {"zzzz": 1}})
    assert all(key in str(caught.value) for key in SURFACE["engine"].split())


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"world": "atlantis"}, "world"),
        ({"world": "miniature", "rounds": 0}, "rounds"),
        ({"world": "miniature", "control": "unfilterd"}, "control"),
        ({"world": "miniature", "name": "../elsewhere"}, "name"),
        ({"world": "miniature", "answers": {"samples": "many"}}, "answers.samples"),
        ({}, "data.demonstrations"),
        ({"data": {"demonstrations": "a.jsonl"}}, "data.evaluation"),
        ([], "mapping"),
        (None, "mapping"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(values: Any, names: str) -> None:
    with pytest.raises(InputError) as caught:
        check(AlignmentRecipe, values)
    assert names in str(caught.value) and "\n" not in str(caught.value)


def test_training_takes_steps_or_epochs() -> None:
    with pytest.raises(InputError, match="either steps or epochs"):
        training_section("sft", {"lr": 1e-3, "steps": 5, "epochs": 1})


@pytest.mark.parametrize("given_length", [{"steps": 5}, {"epochs": 0.5}, {}])
def test_training_with_one_length_is_fine(given_length: dict[str, float]) -> None:
    section = training_section("dpo", {"lr": 1e-3, **given_length})
    assert (section.steps, section.epochs) == (given_length.get("steps"), given_length.get("epochs"))


NAMES = [
    ".",
    "..",
    ".hidden",
    "../up",
    "a/b",
    "/tmp/x",
    "a\\b",
    "a\nb",
    "a\n",
    "",
    " ",
    "a b",
    "a\0b",
    "\x1b[2J",
    "x" * 201,
    "\u00e9" * 101,
]


@pytest.mark.parametrize("recipe", [AlignmentRecipe, DatasetRecipe, Curation, Blend])
def test_a_name_becomes_a_folder_in_its_place(recipe: type[BaseModel], tmp_path: Path) -> None:
    def error_of(name: str) -> str:
        try:
            check(recipe, {"name": name})
        except InputError as e:
            return str(e)
        return ""

    assert not [name for name in NAMES if "a run's name" not in error_of(name)]
    assert not [name for name in ("mine", "a.b-c_d", "2024", "-x", "a..b", "\u00e9t\u00e9", "x" * 200) if "a run's name" in error_of(name)]


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    folder = tmp_path / "recipes"
    folder.mkdir()
    data = {"demonstrations": "demos.jsonl", "evaluation": "../test.jsonl", "ratings": "/elsewhere/ratings.parquet"}
    loaded = load(write(folder, {"model": "models/llama", "data": data}), AlignmentRecipe)
    assert loaded.model == str(folder / "models" / "llama")
    assert loaded.data.demonstrations == folder / "demos.jsonl"
    assert loaded.data.evaluation == tmp_path / "test.jsonl"
    assert loaded.data.ratings == Path("/elsewhere/ratings.parquet")
    assert loaded.data.prompts is None


@pytest.mark.parametrize("recipe", [RlRecipe, CompressionRecipe, ReasoningRecipe])
def test_every_kinds_model_is_relative_to_the_file(tmp_path: Path, recipe: type[Recipe]) -> None:
    kind = recipe.model_fields["kind"].default
    assert load(write(tmp_path, {"kind": kind, "world": "miniature", "model": "mine"}), recipe).model == str(tmp_path / "mine")
    assert load(write(tmp_path, {"kind": kind, "world": "miniature"}), recipe).model == "miniature"


def test_the_shipped_model_is_no_path(tmp_path: Path) -> None:
    assert load(write(tmp_path, {"world": "miniature", "model": "miniature"}), AlignmentRecipe).model == "miniature"


def test_overrides_win_and_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path, {"world": "miniature", "rounds": 2})
    assert load(path, AlignmentRecipe, {"rounds": 5}).rounds == 5
    with pytest.raises(InputError, match="control"):
        load(path, AlignmentRecipe, {"control": "none"})


@pytest.mark.parametrize("text", ["rounds: [", "just text", "- a\n- b", ""])
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="bad.yaml") as caught:
        load(path, AlignmentRecipe)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gristmill init"):
        load(tmp_path / "none.yaml", AlignmentRecipe)


@given(
    seed=st.integers(0, 2**31),
    rounds=st.integers(1, 9),
    control=st.sampled_from([None, *CONTROLS]),
    lr=st.floats(1e-7, 1.0),
    temperatures=st.lists(st.floats(0, 2), min_size=1, max_size=4),
    loss=st.sampled_from(["dpo", "cdpo", "ipo", "rpo", "rpo_fwd_kl", "rpo_sq"]),
)
def test_dump_and_load_are_inverse(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    rounds: int,
    control: str | None,
    lr: float,
    temperatures: list[float],
    loss: str,
) -> None:
    values = {
        "seed": seed,
        "rounds": rounds,
        "control": control,
        "model": "/models/llama",
        "data": {"demonstrations": "/data/a.jsonl", "evaluation": "/data/b.jsonl"},
        "answers": {"temperatures": temperatures},
        "rpo": {"lr": lr, "steps": 3, "loss": loss},
    }
    recipe = check(AlignmentRecipe, values)
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(dump(recipe))
    assert load(path, AlignmentRecipe) == recipe


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGED = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
HOSTILE = {
    "huge integer": "seed: " + "9" * 5000,
    "integer beyond 2^53": "seed: 99999999999999999",
    "huge hexadecimal": "seed: 0x" + "f" * 100_000,
    "sexagesimal": "seed: " + "1" + ":1" * 100_000,
    "nested lists": "a: " + "[" * 50_000,
    "nested, closed": "a: " + "[" * 200 + "]" * 200,
    "nested mappings": "a: " + "{a: " * 5000 + "}" * 5000,
    "nested blocks": "".join(" " * i + "a:\n" for i in range(300)),
    "billion laughs": LAUGHS,
    "billion laughs by merging": MERGED,
    "an alias in itself": "a: &a [*a]",
    "no date": "name: 2020-13-45",
    "a wrong tag": "seed: !!int x",
    "a wrong time": "seed: !!timestamp x",
    "wrong base64": "seed: !!binary 'x'",
    "an object": "seed: !!python/object/apply:os.system [ls]",
    "NUL": 'name: "a\\0b"',
    "half a pair": 'name: "\\ud800"',
    "a list as a key": "? [a]\n: 1",
    "a key twice": "seed: 1\nseed: 2",
    "two documents": "a: 1\n---\na: 2",
    "a list": "- 1",
    "nothing": "",
    "no UTF-8": b"name: \xff\xfe",
    "control characters": b"name: \x07",
    "too large": b"# " + b"x" * (MAX_YAML_BYTES + 1),
    "no key of ours": "1: 2",
    "user": "model: ~nobody-of-this-name/x.yaml",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_one_sentence(tmp_path: Path, name: str) -> None:
    path, text = tmp_path / "r.yaml", HOSTILE[name]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        load(path, AlignmentRecipe)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000 and "r.yaml" in str(caught.value)


def test_places_that_hold_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("folder.yaml", "pipe.yaml", "x" * 300 + ".yaml", "a\0b.yaml"):
        with pytest.raises(InputError, match="There is no recipe"):
            find_recipe(str(tmp_path / name), "alignment")
        with pytest.raises(InputError, match="cannot be read"):
            load(tmp_path / name, AlignmentRecipe)


def test_aliases_and_merged_mappings_are_welcome(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: &a {lr: 1.0e-5, steps: 3}\nb: {<<: *a, steps: 4}\nc: [*a, *a]\nd: -12\n")
    found = read(tmp_path / "r.yaml")
    assert found["b"] == {"lr": 1e-5, "steps": 4} and found["c"] == [found["a"]] * 2 and found["d"] == -12


def test_what_stands_in_tables_and_cards_is_one_line() -> None:
    values = {"generators": [{"base_url": "http://127.0.0.1/v1", "model": "m"}], "pipelines": {"from_file": None}, "prompts": "p.jsonl"}
    assert check(DatasetRecipe, values | {"licence": "cc-by-4.0"}).licence == "cc-by-4.0"
    for wrong in ({"licence": "mit\n---\n# Hello"}, {"generators": [{"base_url": "http://127.0.0.1/v1", "model": "m\u2028n"}]}):
        with pytest.raises(InputError, match="one line"):
            check(DatasetRecipe, values | wrong)
