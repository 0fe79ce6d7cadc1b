"""The shipped Base: it loads, is small, and has room for everything that the world says."""

from gristmill.data.chat import conversation
from gristmill.data.find_format import guess_format
from gristmill.miniature.base import BASE
from gristmill.miniature.human import demonstrations, ratings
from gristmill.miniature.world import World
from gristmill.model.config import PRESETS
from gristmill.model.flops import num_parameters
from gristmill.model.hf import load_model
from gristmill.workflows.alignment.recipe import AlignmentRecipe


def test_the_base_is_the_preset_and_small() -> None:
    model, tokenizer = load_model(BASE)
    assert model.config == PRESETS["miniature"] and 1_000_000 <= num_parameters(model.config) <= 4_000_000
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 16 * 2**20
    assert guess_format(tokenizer).name == "nemotron"


def test_every_human_row_and_every_evaluation_prompt_fits() -> None:
    model, tokenizer = load_model(BASE)
    chat_format, world = guess_format(tokenizer), World.make()
    talks = [conversation(r["messages"]) for r in demonstrations(world, 400, 0) + ratings(world, 200, 0)]
    assert max(len(chat_format.render(talk, tokenizer).ids) for talk in talks) <= model.config.max_positions
    prompts = [p.messages for problems in world.held_out.values() for p in problems]
    longest = max(len(chat_format.render_prompt(messages, tokenizer)) for messages in prompts)
    assert longest + AlignmentRecipe.model_fields["answers"].default.max_tokens + 16 <= model.config.max_positions
