import torch
from torch import Tensor

from hf_ssl.methods.image_text.clip import clip_logits, clip_loss
from tests.golden.harness import Case, runner


def rank_loss(ranks: list[tuple[Tensor, Tensor]], rank: int, scale: Tensor, local: bool, with_grad: bool) -> Tensor:
    """What ``rank`` computes, the gather written out: open_clip's four combinations of its two switches.

    local: rows of this rank only (ours), else every rank computes all rows. with_grad: the gather carries gradient
    (ours); without it the other ranks' parts are constants, and with local rows this rank's own columns as well.
    """
    images, texts = ranks[rank]

    def gathered(side: int) -> Tensor:
        parts = [part[side] for part in ranks]
        if not with_grad:
            parts = [part if index == rank and not local else part.detach() for index, part in enumerate(parts)]
        return torch.cat(parts)

    all_images, all_texts = gathered(0), gathered(1)
    if local:
        return clip_loss(*clip_logits(images, texts, all_images, all_texts, scale), offset=rank * len(images))[0]
    return clip_loss(*clip_logits(all_images, all_texts, all_images, all_texts, scale))[0]


@runner("clip/")
def losses(case: Case) -> dict[str, Tensor]:
    """Every variant on every rank; a rank's feature gradient is the sum over the losses that reach it."""
    world = case.config["world"]
    got = {}
    for variant, switches in case.config["variants"].items():
        local, with_grad = switches.get("local_loss", False), switches.get("gather_with_grad", False)
        sides = ("image_features", "text_features")
        ranks = [tuple(case.input(f"rank{r}.{side}").requires_grad_() for side in sides) for r in range(world)]
        scales = [case.input("logit_scale").requires_grad_() for _ in range(world)]
        parts = [rank_loss(ranks, r, scales[r], local, with_grad) for r in range(world)]
        torch.stack(parts).sum().backward()
        for r in range(world):
            got[f"rank{r}.{variant}.loss"] = parts[r]
            leaves = dict(zip((*sides, "logit_scale"), (*ranks[r], scales[r]), strict=True))
            got |= {f"grad.rank{r}.{variant}.{name}": leaf.grad for name, leaf in leaves.items()}
    return got
