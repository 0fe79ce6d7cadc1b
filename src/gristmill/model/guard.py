"""Guard model: the decoder with a linear head of one logit a category of unsafe content.

Shapes: T tokens of all documents, D hidden size, N judged turns, C categories.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted
from gristmill.model.packed import PackedShape
from gristmill.model.reward import new_head
from gristmill.model.transformer import Transformer

MAX_CODES = 100
THRESHOLD = 0.5  # of a category's probability, where none was fitted


class GuardModel(nn.Module):
    """One logit a category of the turn that ends at a token; sigmoids make probabilities of them.

    As the reward head: it has a bias, is initialised like the backbone's matrices and computes in fp32.

    Args:
        codes: of the categories, in the head's order.
        thresholds: probability from which a category counts as violated; default THRESHOLD for all.
        caution: code of the category that a permissive guard lets go.

    Raises:
        InputError: the codes are none, or a threshold is no probability.
    """

    def __init__(
        self, backbone: Transformer, codes: Sequence[str], *, thresholds: Sequence[float] = (), caution: str = "", seed: int = 0
    ) -> None:
        super().__init__()
        if not isinstance(codes, list | tuple) or not all(isinstance(code, str) and 0 < len(code) <= 16 for code in codes):
            raise InputError(f"Give the codes of a guard as short texts, not {quoted(codes)}.")
        if not 0 < len(codes) <= MAX_CODES or len(set(codes)) < len(codes):
            raise InputError(f"A guard has 1 to {MAX_CODES} codes, each once, not {quoted(codes)}.")
        limits = list(thresholds) if isinstance(thresholds, list | tuple) and len(thresholds) else [THRESHOLD] * len(codes)
        if len(limits) != len(codes) or not all(type(t) in (int, float) and 0 <= t <= 1 for t in limits):
            raise InputError(f"A guard of {len(codes)} codes needs as many thresholds from 0 to 1, not {quoted(thresholds)}.")
        if not isinstance(caution, str) or (caution and caution not in codes):
            raise InputError(f"The caution code {quoted(caution)} is none of the guard's.")
        self.backbone, self.codes, self.caution = backbone, tuple(codes), caution
        self.thresholds = tuple(float(limit) for limit in limits)
        self.head = new_head(backbone, len(codes), seed)

    def forward(self, ids_T: Tensor, shape: PackedShape, ends_N: Tensor) -> Tensor:
        """Logits [N, C] in fp32. `ends_N` are the indices in ids_T of the tokens that end the judged turns."""
        return self.head(self.backbone.hidden(ids_T, shape, ends_N).float())
