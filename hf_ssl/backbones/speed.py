"""Networks made ready to train: the same weights, names and results in less time and memory."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .tokens import prepare_class_token

SMALL = 4  # positions of a feature map, at most, for which a matrix beats torch's convolution on a CPU (measured)


def prepare_to_train(model: nn.Module) -> None:
    """In place: kernels channels-last, 1.3 to 1.5 times as fast, on CPU as well; convolutions that know small maps; in
    a native ResNet ReLUs in place, 8 % less memory, and a pool without a list of maxima, 2 %; in a native ViT a last
    block that knows when the class token alone is wanted. Saved weights stay what they were."""
    prepare_class_token(model)
    convolutions = [module for module in model.modules() if type(module) is nn.Conv2d]
    if len(convolutions) > 2:  # a patch embedding alone gains nothing
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in filter(_is_ordinary, convolutions):
        module.__class__ = SmallMapConv2d
    for module in model.modules():
        if not type(module).__module__.endswith(".modeling_resnet"):
            continue
        if isinstance(activation := getattr(module, "activation", None), nn.ReLU):
            activation.inplace = True  # nobody reads what comes before it
        if type(pool := getattr(module, "pooler", None)) is nn.MaxPool2d:
            pool.__class__ = ForgetfulMaxPool2d


def _is_ordinary(module: nn.Conv2d) -> bool:
    """Zeros around the map, less than a kernel of them; no groups, no holes."""
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return False
    narrow = all(pad < side for pad, side in zip(module.padding, module.kernel_size, strict=True))
    return narrow and module.groups == 1 and module.dilation == (1, 1)


class SmallMapConv2d(nn.Conv2d):
    """``nn.Conv2d`` that computes feature maps of up to four positions as one matrix product, on a CPU.

    There most taps of a kernel meet padding alone: at 1×1 one of nine meets a pixel, and torch 2.14 takes as long as
    for all, in bf16 15 times as long as the product. Its bf16 gradient of a strided convolution at 1×1 is memory that
    nobody has written; the product's is right.
    """

    padding: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[-2:]
        plain = height * width > SMALL or (height * width > 1 and self.kernel_size == (1, 1))
        if plain or not input.is_cpu or input.ndim != 4:
            return super().forward(input)
        if any(s + 2 * p < k for s, p, k in zip((height, width), self.padding, self.kernel_size, strict=True)):
            return super().forward(input)  # torch says what is wrong
        matrix, size = self.as_matrix(height, width)
        bias = None if self.bias is None else self.bias.repeat(size[0] * size[1])
        out = F.linear(input.permute(0, 2, 3, 1).flatten(1), matrix, bias)
        return out.unflatten(1, (*size, -1)).permute(0, 3, 1, 2)

    def as_matrix(self, height: int, width: int) -> tuple[Tensor, tuple[int, int]]:
        """From a (height, width) map, flattened as (H, W, C), to the resulting one: ((h·w·O, H·W·C), (h, w))."""
        sides = zip((height, width), self.kernel_size, self.stride, self.padding, strict=True)
        starts = [  # the tap that meets the map's first row (column), for each row (column) of the result
            [pad - step * i for i in range((side + 2 * pad - kernel) // step + 1)] for side, kernel, step, pad in sides
        ]
        kernel = self.weight.permute(0, 2, 3, 1)
        rows = [_window(kernel, top, left, height, width).flatten(1) for top in starts[0] for left in starts[1]]
        return torch.cat(rows), (len(starts[0]), len(starts[1]))


def _window(kernel: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """(O, height, width, C) of a kernel (O, kh, kw, C) from tap (top, left) on; zeros where it has none."""
    rows = slice(max(top, 0), min(top + height, kernel.shape[1]))
    columns = slice(max(left, 0), min(left + width, kernel.shape[2]))
    edges = (columns.start - left, left + width - columns.stop, rows.start - top, top + height - rows.stop)
    cut = kernel[:, rows, columns]
    return F.pad(cut, (0, 0, *edges)) if any(edges) else cut


class ForgetfulMaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` that keeps no list of where its maxima were, int64 and so four times a bf16 result's size: the
    backward pass finds them again in the input, which the ReLU before it keeps anyway."""

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        return checkpoint(super().forward, input, use_reentrant=False, preserve_rng_state=False)
