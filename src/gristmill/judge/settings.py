"""Sections of recipes about judges."""

from pydantic import Field

from gristmill.core.config import PatternPath, Section


class Reward(Section):
    """The reward model: behind an endpoint, or in a folder."""

    base_url: str = ""
    model: str = Field("", description="name at the endpoint, or the folder of a reward model")
    api_key_env: str = ""
    api_key_file: PatternPath = ""
    weights: str = Field("nemotron4-340b", description="named set of aggregation weights")
