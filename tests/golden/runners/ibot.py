"""iBOT's cases. The method is not here yet, but DINOv2 took its losses, masks and steps over: those are compared."""

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ssl import backbones, masks, schedules
from hf_ssl.heads import spare
from hf_ssl.losses import dino_loss, patch_loss
from hf_ssl.memory import Center
from hf_ssl.methods.joint_embedding.dinov2 import SSLDINOv2Config, SSLDINOv2ForPreTraining
from hf_ssl.momentum import ema_update
from hf_ssl.training.optim import clip_per_tensor
from tests.golden.harness import Case, NotOurs, gradients, runner
from tests.golden.ranks import on_ranks
from tests.golden.runners import vit
from tests.golden.runners.dino import warmup_share


def temperatures(loss: dict[str, Any], patches: bool) -> Tensor:
    """(epochs,) the teacher's temperature of class tokens, or of patches, whose warm-up may begin later."""
    kind, start = ("2", loss.get("mim_start_epoch", 0)) if patches else ("", 0)
    epochs, warm = loss["nepochs"], warmup_share(loss["warmup_teacher_temp_epochs"], loss["nepochs"])
    ends = loss[f"warmup_teacher_temp{kind}"], loss[f"teacher_temp{kind}"]
    return torch.tensor([float(schedules.linear(max(e - start, 0) / epochs, *ends, warm)) for e in range(epochs)])


class Centers:
    """Both moving means. iBOT takes all patches into the second one, our DINOv2 those of its loss alone."""

    def __init__(self, loss: dict[str, Any], cls: Tensor, patch: Tensor):
        self.cls, self.patch = Center(cls.shape[-1]), Center(patch.shape[-1])
        self.cls.value.copy_(cls.view(1, -1))
        self.patch.value.copy_(patch.view(1, -1))
        self.momenta = loss.get("center_momentum", 0.9), loss.get("center_momentum2", 0.9)

    def follow(self, cls: Tensor, patches: Tensor) -> None:
        for center, rows, momentum in zip((self.cls, self.patch), (cls, patches.flatten(0, 1)), self.momenta):
            center.observe(rows)
            center.advance(momentum)


def one_loss(case: Case, prefix: str, epoch: int, centers: Centers) -> dict[str, Tensor]:
    """The losses of the tensors under ``prefix``, with the centres before and after."""
    loss = case.config["loss"]
    temperature = loss.get("student_temp", 0.1)
    student = {name: case.input(f"{prefix}{name}").requires_grad_() for name in ("student_cls", "student_patch")}
    if f"input.{prefix}student_local_cls" in case.tensors:
        student["student_local_cls"] = case.input(f"{prefix}student_local_cls").requires_grad_()
    cls, patches = case.input(f"{prefix}teacher_cls"), case.input(f"{prefix}teacher_patch")
    hidden = torch.cat([case.input(f"{prefix}mask{view}") for view in range(loss.get("ngcrops", 2))]).flatten(1)
    warm = [float(temperatures(loss, which)[epoch]) for which in (False, True)]
    targets = F.softmax((cls - centers.cls.value) / warm[0], dim=-1)
    patch_targets = F.softmax((patches - centers.patch.value) / warm[1], dim=-1)
    crops = torch.cat([rows for name, rows in student.items() if name.endswith("cls")])
    batch = len(cls) // loss.get("ngcrops", 2)
    first = loss.get("lambda1", 1.0) * dino_loss(crops, targets, batch, temperature)
    places, weights = masks.masked_positions(hidden)
    rows, wanted = student["student_patch"].flatten(0, 1)[places], patch_targets.flatten(0, 1)[places]
    second = loss.get("lambda2", 1.0) * patch_loss(rows, wanted, weights, len(hidden), temperature)
    grads = gradients(first + second, **student)
    centers.follow(cls, patches)
    got = {
        f"{prefix}loss": first + second, f"{prefix}cls_loss": first, f"{prefix}patch_loss": second,
        f"{prefix}center": centers.cls.value.clone(), f"{prefix}center2": centers.patch.value.clone()[None],
        **{f"grad.{prefix}{name}": grad for name, grad in grads.items()},
    }  # fmt: skip
    return got | {f"{prefix}loss_{name}": got[f"{prefix}{name}_loss"] for name in ("cls", "patch")}


@runner("ibot/loss")
def losses(case: Case) -> dict[str, Tensor]:
    centers = Centers(case.config["loss"], case.input("center0"), case.input("center2_0"))
    got = {f"teacher_temp{name}_schedule": temperatures(case.config["loss"], bool(name)) for name in ("", "2")}
    for step, epoch in enumerate(case.config["epochs"]):
        got |= one_loss(case, f"step{step}.", epoch, centers)
    return got


@runner("ibot/loss_two_rank")
def losses_of_ranks(case: Case) -> dict[str, Tensor]:
    def part(rank: int) -> dict[str, Tensor]:
        centers = Centers(case.config["loss"], case.input("center"), case.input("center2"))
        return one_loss(case, f"rank{rank}.", case.config["epoch"], centers)

    return {key: value for part in on_ranks(case.world, part) for key, value in part.items()}


class PythonsRandom:
    """Python's own generator, which the official masks are drawn from, as our masks ask a generator of NumPy's."""

    def random(self) -> float:
        return random.random()

    def integers(self, below: int) -> int:
        return random.randint(0, below - 1)


def drawn_ratio(generator: dict[str, Any]) -> float:
    """The official share of masked patches: one of several, each within a range of its own."""
    given = list(zip(generator["pred_ratio"], generator["pred_ratio_var"], strict=True))
    ratios = [random.uniform(ratio - var, ratio + var) if var > 0 else ratio for ratio, var in given]
    return random.choice(ratios) if len(ratios) > 1 else ratios[0]


def drawn_mask(generator: dict[str, Any], grid: tuple[int, int]) -> np.ndarray:
    patches = grid[0] * grid[1]
    wanted = drawn_ratio(generator) * patches
    if generator["pred_shape"] == "block":
        low, high = generator["pred_aspect_ratio"]
        if not (np.isclose(low, 0.3) and np.isclose(high, 1 / 0.3)):
            raise NotOurs("a block's aspect is log-uniform from .3 to 1/.3, in BEiT, iBOT and DINOv2 alike")
        rng: Any = PythonsRandom()
        return masks.block_mask(rng, grid, wanted, smallest=(min(grid) // 3) ** 2)
    order = np.arange(patches)
    np.random.shuffle(order)  # ours masks the patches of largest noise: here of largest place in the official shuffle
    kept = patches - int(wanted)
    if kept in (0, patches):
        return np.full(grid, kept == 0)
    _, _, mask = masks.random_masking(torch.from_numpy(order)[None].double(), kept)
    return mask[0].view(grid).bool().numpy()


@runner("ibot/mask_block")
@runner("ibot/mask_rand")
def drawn(case: Case) -> dict[str, Tensor]:
    """Masks of the official seeds, patch by patch, and their statistics over the two large crops of many images."""
    c = case.config
    grids = [tuple(c["grid"])] * 2 + [tuple(c["local_grid"])] * c["local_crops"]
    names = ["crop0", "crop1", *(f"local{crop}" for crop in range(c["local_crops"]))]

    def image() -> list[np.ndarray]:
        return [drawn_mask(c["generator"], grid) for grid in grids]

    def begin(seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed)

    got: dict[str, Tensor] = {}
    held = random.getstate(), np.random.get_state()
    begin(c["seed"])
    for number in range(c["exact_images"]):
        got |= {f"exact.image{number}.{name}": torch.from_numpy(m) for name, m in zip(names, image(), strict=True)}
    begin(c["stat_seed"])
    many = torch.from_numpy(np.stack([mask for _ in range(c["stat_images"]) for mask in image()[:2]])).double()
    random.setstate(held[0])
    np.random.set_state(held[1])
    share = many.mean((1, 2))
    quantiles = share.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=share.dtype))
    return got | {
        "stat.masked_fraction.mean": share.mean(), "stat.masked_fraction.std": share.std(),
        "stat.masked_fraction.quantiles": quantiles, "stat.mean_mask_per_position": many.mean(0),
        "stat.fraction_unmasked_images": (share == 0).double().mean(),
    }  # fmt: skip


_HEAD2 = "head.last_layer2."  # of the patches, where they have prototypes of their own


def our_names(official: str) -> list[str]:
    """Names within official ``student`` or ``teacher`` -> within ours."""
    if official == "backbone.masked_embed":
        return ["mask_token"]
    if official.startswith("backbone."):
        return [f"backbone.{name}" for name in vit.native_names(official.removeprefix("backbone."))]
    return [official.replace(_HEAD2, "patch_head.last_layer.")]


def model_of(case: Case) -> Any:
    c, loss = case.config, case.config["loss"]
    size = {"img_size": c["img"], **c["vit"]}
    config = SSLDINOv2Config(
        backbone_config=vit.config(size, c.get("ln_eps", 1e-6)), out_dim=c["out_dim"], hidden_dim=c["hidden"],
        bottleneck_dim=c["bottleneck"], separate_heads=not c["shared_head"], patch_out_dim=c["patch_out_dim"],
        patch_hidden_dim=c["hidden"], patch_bottleneck_dim=c["bottleneck"], koleo_weight=0.0,
        student_temperature=loss.get("student_temp", 0.1), patch_weight=loss.get("lambda2", 1.0),
        center_momentum=loss.get("center_momentum", 0.9),
    )  # fmt: skip
    model: Any = SSLDINOv2ForPreTraining(config)
    if not c["shared_head"]:  # iBOT's heads differ in their prototypes alone
        model.patch_head.mlp, model.teacher_patch_head.mlp = model.head.mlp, model.teacher_head.mlp
    for side, prefix in (("student", ""), ("teacher", "teacher_")):
        state = {}
        for official, value in case.part(f"weight.{side}").items():
            if c["shared_head"] and official.startswith(_HEAD2):
                continue
            names = our_names(official)
            parts = value.chunk(len(names))
            state |= {f"{prefix}{name}": part for name, part in zip(names, parts, strict=True)}
        if "mask_token" in state:
            state["mask_token"] = state["mask_token"][None]
        _, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected, unexpected
    for backbone in (model.backbone, model.teacher_backbone):
        backbones.set_position_offset(backbone, 0.1)
    for head in (model.head, model._patch_head("")):
        head.last_layer.weight_g.requires_grad_(not c["norm_last_layer"])
    return model.train()


def image_major(rows: Tensor, batch: int) -> Tensor:
    """(V·B, ...), view after view -> image after image, and back if ``batch`` is the number of views."""
    return rows.unflatten(0, (-1, batch)).transpose(0, 1).flatten(0, 1)


def one_step(case: Case, model: Any, at: str, epoch: int) -> dict[str, Tensor]:
    """Outputs, losses and centres of a step; gradients are left in the model."""
    c, loss = case.config, case.config["loss"]
    large = torch.stack([case.input(f"{at}global{view}") for view in (0, 1)], dim=1)
    small = (
        torch.stack([case.input(f"{at}local{view}") for view in range(c["locals"])], dim=1) if c["locals"] else None
    )
    hidden = torch.stack([case.input(f"{at}mask{view}").flatten(1) for view in (0, 1)], dim=1).bool()
    with torch.no_grad():
        student = model.tokens(model.backbone, large, hidden.flatten(0, 1))
        teacher = model.tokens(model.teacher_backbone, large)
        whole = {"student": (student, ""), "teacher": (teacher, "teacher_")}
        got = {f"{name}_cls": getattr(model, f"{kind}head")(rows.cls) for name, (rows, kind) in whole.items()}
        for name, (rows, kind) in whole.items():
            got[f"{name}_patch"] = image_major(model._patch_head(kind)(rows.patches), 2)
        if small is not None:
            got["student_local_cls"] = model.head(model.tokens(model.backbone, small).cls)
    warm = iter([temperatures(loss, which)[epoch] for which in (False, True)])
    model.teacher_temperature = lambda: next(warm)  # iBOT's patches may have one of their own
    output = model(large, small, hidden)
    output.loss.backward()
    patches = model.config.patch_weight * output.metrics["patch_loss"]
    got |= {"loss": output.loss, "loss_patch": patches, "loss_cls": output.loss - patches}
    for buffer in (model.patch_center.sum, model.patch_center.count):
        buffer.zero_()
    model.patch_center.observe(got["teacher_patch"].flatten(0, 1))  # iBOT's mean is over all patches
    model.center.advance(model.config.center_momentum)
    model.patch_center.advance(loss.get("center_momentum2", 0.9))
    got |= {"center": model.center.value.clone(), "center2": model.patch_center.value.clone()[None]}
    return {f"{at}{name}": value for name, value in got.items()}


def clip(parameters: dict[str, nn.Parameter], official: list[str], limit: float) -> None:
    """Per official tensor: q, k and v are one there, so one norm is theirs; ours are three, each with its own."""
    for name in official if limit else ():
        parts = [parameters[ours] for ours in our_names(name) if ours in parameters]
        if parts and all(part.grad is not None for part in parts):
            whole = nn.Parameter(torch.cat([part.detach() for part in parts]))
            whole.grad = torch.cat([part.grad for part in parts])
            clip_per_tensor([whole], limit)
            for part, grad in zip(parts, whole.grad.chunk(len(parts)), strict=True):
                part.grad.copy_(grad)


@runner("ibot/step_multicrop")
def steps(case: Case) -> dict[str, Tensor]:
    c, model, got = case.config, model_of(case), {}
    assert c["loss"].get("lambda1", 1.0) == 1.0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=c["lr"])
    parameters, official = dict(model.named_parameters()), list(case.part("weight.student"))
    pairs = [(model.backbone, model.teacher_backbone), (model.head, model.teacher_head)]
    if not c["shared_head"]:
        pairs.append((model.patch_head.last_layer, model.teacher_patch_head.last_layer))
    for step, (epoch, momentum) in enumerate(zip(c["epochs"], c["momentum"], strict=True)):
        optimizer.zero_grad()
        got |= one_step(case, model, f"step{step}.", epoch)
        for name in official:
            found = [parameters[ours].grad for ours in our_names(name) if ours in parameters]
            if found and all(grad is not None for grad in found):
                grad = torch.cat(found).clone()
                got[f"grad.step{step}.{name}"] = grad[0] if name == "backbone.masked_embed" else grad
        clip(parameters, official, c["clip_grad"])
        if epoch < c["freeze_last_layer"]:
            spare(model.head.last_layer)
            spare(model._patch_head("").last_layer)
        optimizer.step()
        for student, teacher in pairs:
            ema_update(student, teacher, momentum)
    state = model.state_dict()
    for name in case.part("weight.teacher"):
        found = [state[f"teacher_{ours}"] for ours in our_names(name) if f"teacher_{ours}" in state]
        if found:
            got[f"teacher_after.{name}"] = torch.cat(found)
    return got
