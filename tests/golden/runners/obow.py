from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ssl import backbones
from hf_ssl.methods.joint_embedding.obow import OBoWConfig, OBoWForPreTraining, _inner
from hf_ssl.momentum import ema_update
from tests.golden.harness import Case, NotOurs, runner
from tests.golden.ranks import on_ranks

_EXTRACTORS = {"feature_extractor": "backbone", "feature_extractor_teacher": "teacher_backbone"}
_LAYERS = {"fc": "0", "bn": "1", "last_layer": "3"}


class Extractor(nn.Module):
    """The cases' toy extractor, two convolutions, as a native model is called."""

    def __init__(self, widths: list[int]):
        super().__init__()
        self.a = nn.Conv2d(3, widths[0], 3, stride=2, padding=1)
        self.b = nn.Conv2d(widths[0], widths[1], 3, padding=1)
        self.config = SimpleNamespace(hidden_sizes=widths, model_type="resnet")

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> Any:
        first = self.a(pixel_values).relu()
        second = self.b(first).relu()
        return SimpleNamespace(last_hidden_state=second, hidden_states=[first, second])


def our_name(official: str) -> str | None:
    """Of a parameter; None for the memory, which is filled apart."""
    part, rest = official.split(".", 1) if "." in official else (official, "")
    if part in _EXTRACTORS:
        return f"{_EXTRACTORS[part]}.{rest}"
    if rest.startswith("layers_w."):
        _, level, layer, leaf = rest.split(".")
        return f"generators.{level}.{_LAYERS[layer.split('_', 1)[1]]}.{leaf}"
    return None


def model_of(case: Case) -> Any:
    c, extractor = case.config, case.config["extractor"]
    if c["learn_kappa"]:
        raise NotOurs("OBoW's kappa is learnt in none of the official experiments, and not here")
    if extractor["bow_pool"] != "max" or not extractor["inv_delta"]:
        raise NotOurs("OBoW's words are softly assigned and the largest over places, as in the paper")
    resnet = {"model_type": "resnet", "embedding_size": 4, "depths": [1, 1], "layer_type": "basic"}
    config = OBoWConfig(
        backbone_config={**resnet, "hidden_sizes": c["c"]}, vocabulary_size=c["words"], kappa=c["kappa"],
        levels=[int(level[1:]) - 1 - len(c["c"]) for level in c["levels"]], inverse_delta=extractor["inv_delta"],
    )  # fmt: skip
    model: Any = OBoWForPreTraining(config)
    model.backbone, model.teacher_backbone = Extractor(c["c"]), Extractor(c["c"])
    named = {our_name(key): value for key, value in case.part("weight").items()}
    named.pop(None)
    _, unexpected = model.load_state_dict(named, strict=False)
    assert not unexpected, unexpected
    for level, queue in enumerate(model.vocabulary):
        memory = case.part(f"weight.bow_extractor.bow_extractor.{level}")
        queue.rows.copy_(memory["_embedding"])
        queue.pointer.copy_(memory["_embedding_ptr"][0])
        model.nearest.value[0, level] = memory["_min_distance_mean"][0]
    # The official average starts at a half and stays what it is; ours starts at nothing, which its age makes up for.
    model.step.fill_(10**6)
    return model.train()


def one_place(case: Case, model: Any, prefix: str) -> Any:
    """The words that join the vocabulary, from the places that the case recorded, level by level."""
    kind, calls = case.config["extractor"]["update_type"], [0]

    def chosen(level: Tensor, before: int) -> Tensor:
        if kind == "global_average":
            return level.mean((2, 3))
        number = calls[0] % len(model.levels)
        calls[0] += 1
        place = case.input(f"{prefix}location_index{number}")
        means = (F.avg_pool2d(level, 3, stride=1) if kind == "local_average" else level).flatten(2)
        return means[torch.arange(len(means)), :, place]

    return chosen


def entropies(bags: list[Tensor]) -> dict[str, Tensor]:
    """The official perplexities, exp of entropies: of each image's bag, and of the batch's."""
    mean = [F.normalize(bag.sum(0), p=1, dim=0) for bag in bags]
    return {
        "perplexity_image": torch.stack([torch.special.entr(bag).sum(1).exp().mean() for bag in bags]),
        "perplexity_batch": torch.stack([torch.special.entr(whole).sum().exp() for whole in mean]),
    }


def sequence(case: Case, prefix: str = "") -> dict[str, Tensor]:
    """The official step moves the teacher first, then takes the batch into the mean distance that scales its bags;
    ours does both after the step, so that micro-batches agree: here they come beforehand."""
    c, model, got = case.config, model_of(case), {}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=c["lr"])
    for step in range(c["steps"]):
        at = f"{prefix}step{step}."
        momentum = c["alpha"]
        if isinstance(momentum, list):
            model.config.teacher_momentum = momentum[0]
            momentum = model.teacher_momentum(step / momentum[1])
        for student, teacher in model.teachers():
            ema_update(student, teacher, momentum)
        image = case.input(f"{at}image")
        crops = [case.input(f"{at}crops{kind}").unflatten(0, (len(image), -1)) for kind in range(len(c["crops"]))]
        maps = [_inner(level) for level in backbones.feature_maps(model.teacher_backbone, image, model.levels)]
        model._one_place = one_place(case, model, at)
        model.bags(maps)
        model.nearest.advance(0.99)  # a constant in the official code
        for queue in model.vocabulary:
            queue.waiting.take()
        bags = model.bags(maps)
        features = [model.encode(views) for views in crops]
        losses = torch.stack([model.predict([rows], bags) for rows in features])
        for kind, (rows, views) in enumerate(zip(features, crops, strict=True)):
            rows = rows.unflatten(0, (views.shape[1], -1)).transpose(0, 1).flatten(0, 1)  # image by image
            for level, words in enumerate(model.classifiers()):
                got[f"{at}logits.crops{kind}.level{level}"] = rows @ words.T
        got |= {f"{at}losses": losses, **{f"{at}{name}": value for name, value in entropies(bags).items()}}
        optimizer.zero_grad()
        losses.sum().backward()
        parameters = dict(model.named_parameters())
        for official in case.part("weight"):
            parameter = parameters.get(our_name(official) or "")
            if parameter is not None and parameter.grad is not None:
                got[f"grad.{at}{official}"] = parameter.grad.clone()
        optimizer.step()
        for buffer in (model.nearest.sum, model.nearest.count):
            buffer.zero_()
        for level, queue in enumerate(model.vocabulary):
            queue.advance()
            got |= {f"{at}dictionary.level{level}": queue.rows.clone(), f"{at}target.level{level}": bags[level]}
            got[f"{at}pointer.level{level}"] = queue.pointer.clone()[None]
            got[f"{at}min_distance_mean.level{level}"] = model.nearest.value[:, level].clone()
    return got | {f"{prefix}teacher_after.{name}": p for name, p in model.teacher_backbone.named_parameters()}


@runner("obow/step")
def one_process(case: Case) -> dict[str, Tensor]:
    return sequence(case)


@runner("obow/two_rank")
def two_ranks(case: Case) -> dict[str, Tensor]:
    parts = on_ranks(case.world, lambda rank: sequence(case, f"rank{rank}."))
    return {key: value for part in parts for key, value in part.items()}
