"""Fused operations between matrix products: residual add and norm, gated activations, softmax over the vocabulary.

By kernels of ours on a CPU; elsewhere by torch.compile, where `compiled.compiling` says so.

Shapes: T tokens, D hidden size, F ffn size, R rows of logits, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.model import compiled
from gristmill.model.kernels import library as kernels

MAX_ROWS = 0.5  # of a matrix, in a sparse gradient
MAX_PRODUCT = 2**21  # elements of a bf16 product that is made before it is added to its sum


def norm(x: Tensor, gain_D: Tensor, bias_D: Tensor | None, *, eps: float) -> Tensor | None:
    """RMS norm of the last dimension, or with a bias layer norm, in the type of x; None where there is no kernel for x."""
    if kernels.library_for(x) is None:
        return compiled.call(compiled.norm, x, gain_D, bias_D, eps)
    return _AddNorm.apply(x, None, gain_D, bias_D, eps)[1]


def add_norm(x_TD: Tensor, delta_TD: Tensor, gain_D: Tensor, bias_D: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor] | None:
    """Residual add and norm: x + delta, and its norm; None where there is no kernel for x."""
    if kernels.library_for(x_TD) is None:
        return compiled.call(compiled.add_norm, x_TD, delta_TD, gain_D, bias_D, eps)
    return _AddNorm.apply(x_TD, delta_TD, gain_D, bias_D, eps)


class _AddNorm(torch.autograd.Function):
    """Keeps the sum and two numbers a row. Without a delta the sum is x itself, so that its two gradients are added here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, gain_D: Tensor, bias_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        x, size = x.contiguous(), len(gain_D)
        library = kernels.library_for(x)
        assert library is not None
        delta = None if delta is None else delta.contiguous()
        total = x.view_as(x) if delta is None else torch.empty_like(x)
        out, statistics = torch.empty_like(x), torch.empty(x.numel() // size, 2)
        addresses = [kernels.pointer_of(tensor) for tensor in (x, delta, gain_D, bias_D, total, out, statistics)]
        numbers = len(statistics), size, eps, int(bias_D is not None), kernels.TYPES[x.dtype], torch.get_num_threads()
        library.gristmill_norm_forward(*addresses, *numbers)
        ctx.save_for_backward(total, gain_D, statistics)
        ctx.centred, ctx.adds = bias_D is not None, delta is not None
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_total, grad = grads
        if grad is None:
            return grad_total, grad_total if ctx.adds else None, None, None, None
        total, gain_D, statistics = ctx.saved_tensors
        library = kernels.library_for(total)
        assert library is not None
        grad, grad_total = grad.contiguous(), None if grad_total is None else grad_total.contiguous()
        grad_x = torch.empty_like(total)
        grad_gain_D = torch.empty_like(gain_D) if ctx.needs_input_grad[2] else None
        grad_bias_D = torch.empty_like(gain_D) if ctx.centred and ctx.needs_input_grad[3] else None
        tensors = grad, grad_total, total, gain_D, statistics, grad_x, grad_gain_D, grad_bias_D
        numbers = len(statistics), len(gain_D), int(ctx.centred), kernels.TYPES[total.dtype], torch.get_num_threads()
        library.gristmill_norm_backward(*(kernels.pointer_of(tensor) for tensor in tensors), *numbers)
        return grad_x, grad_x if ctx.adds else None, grad_gain_D, grad_bias_D, None


def activation(gate: Tensor, up_TF: Tensor | None, kind: str) -> Tensor | None:
    """f(gate) * up, or f(gate) where there is no up; None where there is no kernel for them.

    Args:
        gate: [T, F]; or [T, 2 F] with up behind the gate, of a gated kind.
        kind: of kernels.ACTIVATIONS; squared ReLU has no up.
    """
    if kernels.library_for(gate) is None:
        return compiled.call(compiled.activation, gate, up_TF, kind)
    return _Activation.apply(gate, up_TF, kind)


def activation_and_gradients(gate: Tensor, up_TF: Tensor | None, grad_TF: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """f(gate) * up and the gradients of gate and up, in one pass where there is a kernel for them. Arguments as of `activation`."""
    if kernels.library_for(gate) is None:
        made = compiled.call(compiled.activation_and_gradients, gate, up_TF, grad_TF, kind)
        return compiled.activation_and_gradients(gate, up_TF, grad_TF, kind) if made is None else made
    gate, up_TF, out_TF = gate.contiguous(), None if up_TF is None else up_TF.contiguous(), torch.empty_like(grad_TF)
    grad_gate, grad_up_TF = torch.empty_like(gate), None if up_TF is None else torch.empty_like(up_TF)
    _activate(gate, up_TF, kind, out_TF=out_TF, grad_TF=grad_TF.contiguous(), grad_gate=grad_gate, grad_up=grad_up_TF)
    return out_TF, grad_gate, grad_up_TF


class _Activation(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up_TF: Tensor | None, kind: str) -> Tensor:
        gate, up_TF = gate.contiguous(), None if up_TF is None else up_TF.contiguous()
        ctx.save_for_backward(gate, up_TF)
        ctx.kind = kind
        out_TF = gate.new_empty(gate.shape[0], _width(gate, up_TF, kind))
        _activate(gate, up_TF, kind, out_TF=out_TF)
        return out_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up_TF = ctx.saved_tensors
        grad_gate, grad_up_TF = torch.empty_like(gate), None if up_TF is None else torch.empty_like(up_TF)
        _activate(gate, up_TF, ctx.kind, grad_TF=grads[0].contiguous(), grad_gate=grad_gate, grad_up=grad_up_TF)
        return grad_gate, grad_up_TF, None


def _width(gate: Tensor, up_TF: Tensor | None, kind: str) -> int:
    """F, where up may lie behind the gate."""
    return gate.shape[1] // (2 if up_TF is None and kind != "squared_relu" else 1)


def _activate(
    gate: Tensor,
    up_TF: Tensor | None,
    kind: str,
    *,
    out_TF: Tensor | None = None,
    grad_TF: Tensor | None = None,
    grad_gate: Tensor | None = None,
    grad_up: Tensor | None = None,
) -> None:
    library, size = kernels.library_for(gate), _width(gate, up_TF, kind)
    assert library is not None
    if size < gate.shape[1]:
        up_TF, grad_up = gate[:, size:], None if grad_gate is None else grad_gate[:, size:]
    addresses = [kernels.pointer_of(x) for x in (gate, up_TF, out_TF, grad_TF, grad_gate, grad_up)]
    numbers = gate.shape[0], size, gate.shape[1], kernels.ACTIVATIONS[kind], kernels.TYPES[gate.dtype], torch.get_num_threads()
    library.gristmill_activate(*addresses, *numbers)


def softmax_statistics(logits_RV: Tensor) -> Tensor | None:
    """Softmax of each row as fp32 numbers [R, 2]: the largest logit, and the logarithm of the sum of exp(logit - largest).

    None where there is no kernel for the logits.
    """
    if (library := kernels.library_for(logits_RV)) is None:
        return None
    (num_rows, size), (stride, step) = logits_RV.shape, logits_RV.stride()
    assert step == 1 or size == 1
    statistics_R2 = torch.empty(num_rows, 2)
    numbers = num_rows, size, stride, kernels.TYPES[logits_RV.dtype], torch.get_num_threads()
    library.gristmill_softmax_forward(logits_RV.data_ptr(), statistics_R2.data_ptr(), *numbers)
    return statistics_R2


def softmax_gradient(logits_RV: Tensor, statistics_R2: Tensor, targets_R: Tensor, factor_R: Tensor, *, out_RV: Tensor) -> None:
    """factor * (softmax - onehot of the target, if it is not below zero) into out, which may be the logits themselves."""
    library = kernels.library_for(logits_RV)
    (num_rows, size), (stride, step), (to_stride, to_step) = logits_RV.shape, logits_RV.stride(), out_RV.stride()
    assert library is not None and (step == to_step == 1 or size == 1)
    tensors = logits_RV, statistics_R2, targets_R.contiguous(), factor_R.contiguous(), out_RV
    numbers = num_rows, size, stride, to_stride, kernels.TYPES[logits_RV.dtype], torch.get_num_threads()
    library.gristmill_softmax_backward(*(x.data_ptr() for x in tensors), *numbers)


def kl_divergence(logits_RV: Tensor, teacher_RV: Tensor, *, keeps: bool) -> Tensor | None:
    """KL(teacher || student) of each row [R] from the logits of both; None where there is no kernel for them.

    Args:
        keeps: its gradient in the student's logits takes their place.
    """
    library, statistics_R2, of_teacher_R2 = kernels.library_for(logits_RV), softmax_statistics(logits_RV), softmax_statistics(teacher_RV)
    if library is None or statistics_R2 is None or of_teacher_R2 is None or logits_RV.dtype != teacher_RV.dtype:
        return None
    kl_R = torch.empty(len(logits_RV))
    pointers = (x.data_ptr() for x in (logits_RV, statistics_R2, teacher_RV, of_teacher_R2, kl_R))
    sizes = *logits_RV.shape, logits_RV.stride(0), teacher_RV.stride(0)
    library.gristmill_kl_divergence(*pointers, *sizes, keeps, kernels.TYPES[logits_RV.dtype], torch.get_num_threads())
    return kl_R


@dataclass(frozen=True)
class _InPlace:
    """What is kept of a weight whose gradient is added in place: copies by type of computation, memory for the gradient and for a copy, the
    list of weights that have been copied into such memory, and whether the gradient may be sparse.
    """

    copies: dict[torch.dtype, Tensor]
    gradient: Tensor | None
    copy: Tensor | None
    copied: list[Tensor]
    sparse: bool


_state: dict[Tensor, _InPlace] = {}  # not by thread: a GPU's backward pass has its own


@contextmanager
def accumulating_in_place(
    weights: Sequence[Tensor],
    places: Mapping[Tensor, Tensor] | None = None,
    copies: Mapping[Tensor, Tensor] | None = None,
    fresh: Iterable[Tensor] = (),
    *,
    sparse: bool = False,
) -> Iterator[list[Tensor]]:
    """Backward passes add these weights' gradients to `.grad` as they are made, with no matrix of that size in between.

    Weights do not change meanwhile: each is copied once into another type of computation, however many backward passes there are.

    Args:
        places: memory for the gradients of some weights, whatever it holds.
        copies: the same for their copies, in the type of the computation.
        fresh: weights whose copies hold what they hold.
        sparse: the gradient of an embedding that is used for nothing else may be a sparse tensor of the rows that were read.

    Yields:
        the weights that have been copied into `copies` so far.
    """
    places, copies, copied = places or {}, copies or {}, list[Tensor]()
    _state.update((weight, _InPlace({}, places.get(weight), copies.get(weight), copied, sparse)) for weight in weights)
    for weight in fresh:
        _state[weight].copies[copies[weight].dtype] = copies[weight]
    try:
        yield copied
    finally:
        for weight in weights:
            del _state[weight]


def accumulates(weight: Tensor) -> bool:
    """Whether the gradient of a weight is to be added in place: it is trained and fp32, and given to `accumulating_in_place`."""
    return weight in _state and weight.requires_grad and torch.is_grad_enabled() and weight.dtype == torch.float32


def linear(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """x weight^T + bias in the type of x, of a weight that `accumulates`."""
    return _Linear.apply(x_TD, weight_ND, working_copy(weight_ND, x_TD.dtype), None if bias_N is None else bias_N.to(x_TD.dtype))


def working_copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight that `accumulates`, in the type of the computation: copied once."""
    if weight.dtype == dtype:
        return weight.detach()
    state = _state[weight]
    if dtype not in state.copies:
        if state.copy is not None and state.copy.dtype == dtype:
            # `data` counts its changes alone, which tensors of one mapping do together
            state.copies[dtype] = state.copy.data.copy_(weight.detach())
            state.copied.append(weight)
        else:
            state.copies[dtype] = weight.detach().to(dtype)
    return state.copies[dtype]


def new_gradient(weight: Tensor) -> Tensor:
    """Memory for the gradient of a weight that `accumulates`, not set."""
    state = _state.get(weight)
    return torch.empty_like(weight) if state is None or state.gradient is None else state.gradient


def add_gradient(weight_ND: Tensor, grad_TN: Tensor, x_TD: Tensor, *, factor: float = 1.0) -> None:
    """Add factor times the gradient of a weight that `accumulates`, where x weight^T had this gradient."""
    if weight_ND.grad is not None:
        return add_product(dense_gradient(weight_ND), grad_TN, x_TD, factor=factor)
    if grad_TN.is_cuda and grad_TN.dtype != torch.float32:
        weight_ND.grad = torch.mm(grad_TN.T, x_TD, out_dtype=torch.float32)
        return
    gradient_ND = new_gradient(weight_ND)
    if x_TD.dtype == torch.float32:
        torch.addmm(weight_ND.new_zeros(()), grad_TN.T, x_TD, beta=0, alpha=factor, out=gradient_ND)
    elif not _tile_product(gradient_ND, grad_TN, x_TD, factor=factor, adds=False):
        for rows in _product_slices(gradient_ND):
            gradient_ND[rows] = grad_TN[:, rows].T @ x_TD
        if factor != 1.0:
            gradient_ND.mul_(factor)
    weight_ND.grad = gradient_ND


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ND: Tensor, used_ND: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TD, used_ND)
        ctx.weight_ND = weight_ND
        return F.linear(x_TD, used_ND, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TN,), (x_TD, used_ND), weight_ND = grads, ctx.saved_tensors, ctx.weight_ND
        add_gradient(weight_ND, grad_TN, x_TD)
        grad_x_TD = grad_TN @ used_ND if ctx.needs_input_grad[0] else None
        return grad_x_TD, None, None, grad_TN.sum(0) if ctx.needs_input_grad[3] else None


def embedding(ids_T: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of a weight that `accumulates`."""
    return _Embedding.apply(ids_T, weight_VD)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids_T: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(ids_T)
        ctx.weight_VD = weight_VD
        return F.embedding(ids_T, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        (ids_T,), weight_VD = ctx.saved_tensors, ctx.weight_VD
        if not _add_rows(weight_VD, ids_T, grads[0]):
            dense_gradient(weight_VD).index_add_(0, ids_T, grads[0])
        return None, None


def _add_rows(weight_VD: Tensor, ids_T: Tensor, grad_TD: Tensor) -> bool:
    """Add to a gradient that is sparse and stays so; False where it is not to be, and nothing is done."""
    state, before = _state.get(weight_VD), weight_VD.grad
    if state is None or not state.sparse or (before is not None and not before.is_sparse):
        return False
    held = ids_T[:0] if before is None else before.indices()[0]
    rows, places = torch.unique(torch.cat([held, ids_T]), return_inverse=True)
    if len(rows) > MAX_ROWS * len(weight_VD):
        return False
    sums = grad_TD.new_zeros(len(rows), grad_TD.shape[1])
    if before is not None:
        sums[places[: len(held)]] = before.values()
    sums.index_add_(0, places[len(held) :], grad_TD)  # in the order of a dense gradient, which torch's sums of sparse tensors do not keep
    weight_VD.grad = torch.sparse_coo_tensor(rows[None], sums, weight_VD.shape, is_coalesced=True, check_invariants=False)
    return True


def dense_gradient(weight: Tensor) -> Tensor:
    """The gradient of a weight that `accumulates`, made dense if it was sparse, or zeros if there was none."""
    if weight.grad is None:
        weight.grad = new_gradient(weight).zero_()
    elif weight.grad.is_sparse:
        rows, sums = weight.grad.indices()[0], weight.grad.values()
        weight.grad = new_gradient(weight).zero_().index_copy_(0, rows, sums)
    return weight.grad


def add_product(sum_VD: Tensor, left_TV: Tensor, right_TD: Tensor, *, factor: float = 1.0) -> None:
    """sum += factor * left^T right, accumulated in fp32, without another matrix of that size; on a GPU in bf16 without a factor."""
    if left_TV.dtype == torch.float32:
        sum_VD.addmm_(left_TV.T, right_TD, alpha=factor)
    elif left_TV.is_cuda:
        torch.addmm(sum_VD, left_TV.T, right_TD, out_dtype=torch.float32, out=sum_VD)
    elif not _tile_product(sum_VD, left_TV, right_TD, factor=factor, adds=True):  # torch has no product of bf16 with a sum in fp32
        for rows in _product_slices(sum_VD):
            sum_VD[rows].add_(left_TV[:, rows].T @ right_TD, alpha=factor)


def _tile_product(sum_VD: Tensor, left_TV: Tensor, right_TD: Tensor, *, factor: float, adds: bool) -> bool:
    """sum = or += factor * left^T right by tile products, which sum in fp32; False where there are none for these, and nothing is done."""
    if left_TV.device.type != "cpu" or left_TV.dtype != torch.bfloat16 or not kernels.has_tiles():
        return False
    if (
        len(left_TV) % 16
        or sum_VD.shape[0] % 32
        or sum_VD.shape[1] % 32
        or not sum_VD.is_contiguous()
        or not 1 == left_TV.stride(1) == right_TD.stride(1)
    ):
        return False
    library = kernels.load()
    assert library is not None
    scaled_TD = right_TD if factor == 1 else right_TD * factor
    sizes = len(left_TV), *sum_VD.shape, left_TV.stride(0), scaled_TD.stride(0)
    library.gristmill_weight_gradient(*(x.data_ptr() for x in (left_TV, scaled_TD, sum_VD)), *sizes, adds, torch.get_num_threads())
    return True


def _product_slices(sum_VD: Tensor) -> Iterator[slice]:
    """Rows of a sum whose product is made at once."""
    step = max(1, MAX_PRODUCT // sum_VD.shape[1])
    for start in range(0, len(sum_VD), step):
        yield slice(start, start + step)
