"""Published measurements of training on H100 clusters, beside what the planner says of the same model, layout and batch.

Sources: the Nemotron-4 reports (arXiv 2402.16819 and 2406.11704), the table in Megatron-LM's README (r0.8), and Llama 3 (arXiv
2407.21783, Table 4). The reports count attention in full, Llama 3 counts it causal. Not published and assumed: Megatron's virtual
stages (one layer each) and micro-batches (4 without a pipeline, 1 with it), the micro-batch of the 15B (2), Llama's virtual stages (8).
None of the rows says what it recomputed.
"""

from dataclasses import dataclass

from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.parallel.layout import Layout
from gristmill.parallel.models import MODELS


@dataclass(frozen=True)
class Published:
    """One measurement: seconds of a step, or MFU by the source's own count of FLOPs (`causal`: attention halved)."""

    name: str
    config: ModelConfig
    layout: Layout
    step_seconds: float = 0.0
    mfu: float = 0.0
    causal: bool = False


def _nemotron() -> list[Published]:
    big, small = MODELS["nemotron4-340b"], MODELS["nemotron4-15b"]
    out = []
    for dp, batch, seconds in ((16, 768, 10.3), (32, 1536, 10.3), (64, 2304, 8.0)):
        layout = Layout(tp=8, pp=12, vp=8, dp=dp, batch_size=batch, seq_len=4096)
        out.append(Published(f"Nemotron-4 340B, DP {dp}", big, layout, step_seconds=seconds))
    for dp, batch, seconds in ((96, 384, 0.57), (192, 768, 0.58), (288, 1152, 0.64)):
        layout = Layout(tp=8, dp=dp, micro_batch=2, batch_size=batch, seq_len=4096)
        out.append(Published(f"Nemotron-4 15B, DP {dp}", small, layout, step_seconds=seconds))
    return out


def _megatron() -> list[Published]:
    """Of each size: hidden size, heads, layers, TP, PP, batch, TFLOP/s a GPU; 131,072 tokens in the vocabulary, DP 48."""
    rows = {
        "1.7B": (2048, 16, 24, 1, 1, 192, 408.8),
        "7.1B": (4096, 32, 30, 2, 1, 192, 465.9),
        "16B": (6144, 48, 32, 4, 1, 192, 489.1),
        "32B": (7168, 56, 48, 8, 1, 192, 459.6),
        "70B": (8192, 64, 84, 8, 2, 384, 419.7),
        "119B": (10_240, 80, 92, 8, 4, 768, 420.5),
        "177B": (12_288, 96, 96, 8, 6, 1152, 432.8),
        "314B": (16_384, 128, 96, 8, 8, 1536, 474.4),
        "462B": (18_432, 144, 112, 8, 16, 3072, 459.9),
    }
    out = []
    for name, (hidden, heads, layers, tp, pp, batch, tflops) in rows.items():
        config = ModelConfig("nemotron", 131_072, hidden, uniform_blocks(layers, heads, heads, 128, 4 * hidden), 4096)
        layout = Layout(
            tp=tp, pp=pp, vp=layers // pp if pp > 1 else 1, dp=48, micro_batch=4 if pp == 1 else 1, batch_size=batch, seq_len=4096
        )
        out.append(Published(f"Megatron {name}", config, layout, mfu=tflops / 989))
    return out


def _llama() -> list[Published]:
    out = []
    for cp, dp, batch, seq_len, mfu in ((1, 64, 2048, 8192, 0.43), (1, 128, 2048, 8192, 0.41), (16, 8, 128, 131_072, 0.38)):
        layout = Layout(tp=8, pp=16, vp=8, cp=cp, dp=dp, batch_size=batch, seq_len=seq_len)
        name = f"Llama 3 405B, DP {dp}" + (f", CP {cp}" if cp > 1 else "")
        out.append(Published(name, MODELS["llama3-405b"], layout, mfu=mfu, causal=True))
    return out


PUBLISHED = (*_nemotron(), *_megatron(), *_llama())
