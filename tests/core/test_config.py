"""The recipe: a frozen surface, errors that name the right key, paths, and a round trip through YAML."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

import gristmill
from gristmill.core.config import check, dump, load
from gristmill.core.errors import InputError
from gristmill.train.settings import section as section_of
from gristmill.workflows.alignment.recipe import CONTROLS, AlignmentRecipe

# Every key a recipe may have. A change here is a change of what users have written down: think twice, then edit.
TRAINING = "optimizer lr muon_lr schedule warmup_steps min_lr_ratio steps epochs batch_size micro_batch_tokens weight_decay clip precision"
PREFERENCE = f"{TRAINING} loss beta eta label_smoothing sft_weight logprobs num_prompts num_pairs min_chosen"
SURFACE = {
    "": (
        "kind name world model chat_format seed rounds rpo_iterations control threads data writing responses judging collapse "
        "demonstration_sft reward code_sft general_sft dpo rpo"
    ),
    "data": (
        "demonstrations ratings prompts evaluation num_demonstrations num_rated_prompts num_prompts num_evaluation num_held_out_ratings"
    ),
    "writing": "templates topics pipelines",
    "writing.topics": "macro subtopics combine broad own file",
    "responses": "samples temperatures max_tokens max_batch precision",
    "judging": (
        "weights min_correctness keep_per_prompt pairs_per_prompt quota writing_quota code_quota code_share min_votes verified_gap min_gap"
    ),
    "collapse": "tokens stop",
    "demonstration_sft": TRAINING,
    "reward": TRAINING,
    "code_sft": TRAINING,
    "general_sft": TRAINING,
    "dpo": PREFERENCE,
    "rpo": PREFERENCE,
}
PRETRAINING = (
    "kind world documents preset tokenizer chat_format tokens seed batch_tokens micro_batch_tokens optimizer lr muon_lr schedule "
    "warmup_steps min_lr_ratio weight_decay precision device"
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
    pipelines = {"writing.pipelines": " ".join(PIPELINES)}
    assert keys_of(AlignmentRecipe) == {name: set(keys.split()) for name, keys in (SURFACE | pipelines).items()}
    assert CONTROLS == ("unfiltered", "random-filter", "reward-only", "human-only", "replace")


def test_pretraining_surface_is_frozen() -> None:
    from gristmill.workflows.pretrain import Pretraining

    assert keys_of(Pretraining) == {"": set(PRETRAINING.split())}


DATASET = """kind name seed models folder chat_format context templates calls topics documents prompts entities pipelines turn dialogues
answers judging near_duplicates licence"""
PIPELINES = {
    "open_qa": "questions revisions",
    "writing": "kinds kinds_per_topic own tasks revisions",
    "closed_qa": "questions",
    "math": "levels topics subtopics problems forms own",
    "python": "topics subtopics problems levels own",
    "instructions": "prompts most whole_talk revision",
    "two_turn": "prompts",
    "by_task": "tasks prompts max_tokens",
    "from_file": "half limit",
    "topic_following": "dialogues turns",
    "incapable": "lacks tasks",
    "document_qa": "questions",
    "tools": "functions requests topics",
    "genetic": "colonies generations births seeds",
}


def test_dataset_surface_is_frozen() -> None:
    from gristmill.synth.registry import Pipelines
    from gristmill.workflows.dataset.recipe import DatasetRecipe

    assert set(DatasetRecipe.model_fields) == set(DATASET.split())
    found = {name: set(get_args(field.annotation)[0].model_fields) for name, field in Pipelines.model_fields.items()}
    assert found == {name: set(keys.split()) for name, keys in PIPELINES.items()}


def test_shipped_recipes_load() -> None:
    from gristmill.core.config import COMMANDS, find_recipe, read
    from gristmill.curate.recipe import Curation
    from gristmill.workflows.dataset.recipe import DatasetRecipe
    from gristmill.workflows.pretrain import Pretraining

    kinds = {"alignment": AlignmentRecipe, "dataset": DatasetRecipe, "curation": Curation, "pretraining": Pretraining}
    assert {read(path)["kind"] for path in SHIPPED} == set(kinds) < set(COMMANDS)
    for path in SHIPPED:
        kind = read(path)["kind"]
        assert find_recipe(path.stem, kind) == path
        load(path, kinds[kind])


@pytest.mark.parametrize(
    ("values", "unknown", "nearest"),
    [
        ({"world": "miniature", "round": 3}, "round", "rounds"),
        ({"world": "miniature", "judgeing": {}}, "judgeing", "judging"),
        ({"world": "miniature", "judging": {"qouta": 5}}, "judging.qouta", "quota"),
        ({"world": "miniature", "dpo": {"lr": 1e-4, "steps": 5, "betta": 0.1}}, "dpo.betta", "beta"),
        ({"world": "miniature", "data": {"demonstration": "a.jsonl"}}, "data.demonstration", "demonstrations"),
    ],
)
def test_an_unknown_key_names_the_nearest(values: dict[str, Any], unknown: str, nearest: str) -> None:
    with pytest.raises(InputError) as caught:
        check(AlignmentRecipe, values)
    assert repr(unknown) in str(caught.value) and repr(nearest) in str(caught.value)


def test_a_key_like_no_other_lists_the_keys() -> None:
    with pytest.raises(InputError) as caught:
        check(AlignmentRecipe, {"world": "miniature", "writing": {"zzzz": 1}})
    assert all(key in str(caught.value) for key in SURFACE["writing"].split())


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"world": "atlantis"}, "world"),
        ({"world": "miniature", "rounds": 0}, "rounds"),
        ({"world": "miniature", "control": "unfilterd"}, "control"),
        ({"world": "miniature", "name": "../elsewhere"}, "name"),
        ({"world": "miniature", "responses": {"samples": "many"}}, "responses.samples"),
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


@pytest.mark.parametrize("given_length", [{}, {"steps": 5, "epochs": 1}])
def test_training_takes_steps_or_epochs(given_length: dict[str, int]) -> None:
    with pytest.raises(InputError, match="either steps or epochs"):
        section_of({"lr": 1e-3, **given_length}, preference=False)


@pytest.mark.parametrize("given_length", [{"steps": 5}, {"epochs": 0.5}])
def test_training_with_one_length_is_fine(given_length: dict[str, float]) -> None:
    section = section_of({"lr": 1e-3, **given_length}, preference=True)
    assert (section.steps, section.epochs) == (given_length.get("steps"), given_length.get("epochs"))


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
        "responses": {"temperatures": temperatures},
        "rpo": {"lr": lr, "steps": 3, "loss": loss},
    }
    recipe = check(AlignmentRecipe, values)
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(dump(recipe))
    assert load(path, AlignmentRecipe) == recipe
