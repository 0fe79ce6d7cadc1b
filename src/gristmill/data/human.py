"""Recipe section of the human data that a run starts from."""

from pydantic import Field

from gristmill.core.config import FilePath, Section


class HumanData(Section):
    """Human data. Without a world, `evaluation` must be given as a file; a world writes its own rows."""

    demonstrations: FilePath | None = Field(None, description="none: the model is an Instruct already, and is the first generator")
    ratings: FilePath | None = None
    prompts: FilePath | None = None
    evaluation: FilePath | None = None
    validation: FilePath | None = Field(
        None,
        exclude_if=lambda path: path is None,
        description="prompts with known answers that choose the best model; default a part of the rows above",
    )
    num_demonstrations: int | None = Field(None, gt=0, description="human conversations to use; default all of the file")
    num_rated_prompts: int | None = Field(None, gt=0, description="rated prompts to train on; default all of the file")
    num_prompts: int | None = Field(None, ge=0, description="collected prompts to use beside those that models write; default all")
    num_evaluation: int | None = Field(None, gt=0, description="held-out prompts a task; default all of the file")
    num_held_out_ratings: int = Field(200, ge=0, description="rated prompts kept from the reward model, to measure it")
