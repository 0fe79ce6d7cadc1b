"""Recipe section of the human data that a run starts from."""

from pydantic import Field

from gristmill.core.config import FilePath, Section


class HumanData(Section):
    """Human data. Without a world, `demonstrations` and `evaluation` must be given as files."""

    demonstrations: FilePath | None = None
    ratings: FilePath | None = None
    prompts: FilePath | None = None
    evaluation: FilePath | None = None
    num_demonstrations: int = Field(240, gt=0, description="human conversations to use")
    num_rated_prompts: int = Field(900, gt=0, description="rated prompts to use (two answers each)")
    num_prompts: int = Field(1000, ge=0, description="collected prompts to use beside those that the model writes")
    num_evaluation: int = Field(100, gt=0, description="held-out prompts a task")
    num_held_out_ratings: int = Field(200, ge=0, description="rated prompts kept from the reward model, to measure it")
