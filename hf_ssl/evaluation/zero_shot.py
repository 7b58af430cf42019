"""Image-text models (CLIP, SigLIP, dual encoders): classes named by prompts, texts and pictures that match."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ssl.data.classes import declared_names, in_order, names_of
from hf_ssl.data.sources import ImageSource, load_source
from hf_ssl.evaluation.classification import UNKNOWN, Predictions
from hf_ssl.evaluation.features import CAPTIONS, Features, extract_features, frozen
from hf_ssl.evaluation.knn import nearest
from hf_ssl.evaluation.natives import load_native, pooled
from hf_ssl.evaluation.prompts import Prompts, resolve

RECALL_AT = (1, 5, 10)


def embed_texts(model: Any, processor: Any, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Unit text embeddings (N, D), float32 on the CPU; texts beyond the model's length are cut off.

    `processor`: CLIPProcessor or the like, or a tokenizer. Tokenised as the zero-shot pipeline of transformers does.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    config = getattr(model.config, "text_config", model.config)
    longest = min(getattr(config, "max_position_embeddings", 512), tokenizer.model_max_length)
    # SigLIP saw texts padded to 64 tokens and takes its feature from the last of them
    padding = "max_length" if "siglip" in model.config.model_type else True
    known = {"input_ids", "attention_mask", *inspect.signature(model.get_text_features).parameters}
    device, embeddings = next(model.parameters()).device, []
    with frozen(model):
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(
                list(texts[start : start + batch_size]),
                padding=padding,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
            inputs = {name: value.to(device) for name, value in batch.items() if name in known}
            embeddings.append(F.normalize(pooled(model.get_text_features(**inputs)).float(), dim=1).cpu())
    return torch.cat(embeddings)


def class_embeddings(model: Any, processor: Any, names: Sequence[str], prompts: Prompts | None = None) -> Tensor:
    """(C, D) unit vectors by CLIP's ensemble rule: embed each prompt, normalise, mean over prompts, normalise.

    A class's prompts are its descriptions in every template. Raises ValueError where `prompts` describe other classes
    than `names`.
    """
    prompts = resolve(prompts, names)
    texts = {name: prompts.texts(name) for name in names}
    distinct = list(dict.fromkeys(text for name in names for text in texts[name]))
    number = {text: i for i, text in enumerate(distinct)}
    found = embed_texts(model, processor, distinct)
    return F.normalize(torch.stack([found[[number[text] for text in texts[name]]].mean(0) for name in names]), dim=1)


def zero_shot_predict(
    model: str | Path | nn.Module,
    processor: Any,
    source: Any,
    label: str | None = None,
    prompts: Prompts | None = None,
    **loading: Any,
) -> Predictions:
    """Class probabilities of every picture of `source` without a classifier: similarity to the classes' prompts.

    `model`: an image-text model, a folder or a Hub id. `processor`: CLIPProcessor or the like, ours, or None for the
    one in the folder. `label`: the column whose values are the classes (default: the source's first). `prompts`: see
    `class_embeddings`; default: `hf_ssl.evaluation.prompts.resolve`. `loading`: batch_size, device, ... of
    `extract_features`. With one template and no description, probabilities are those of transformers'
    zero-shot-image-classification pipeline: softmax of logits_per_image (SigLIP: their sigmoid).
    Raises ValueError for a model without a text tower or a source without that label.
    """
    source = load_source(source)
    model, processor, kind = load_native(model, processor, loading.get("device"))
    if kind != "image_text":
        raise ValueError(f"{type(model).__name__} has no text tower, so it cannot classify by prompts.")
    label = label or next(iter(source.labels), None)
    if label is None:
        raise ValueError(f"{source.name} ({source.split}) has no labels, so there are no classes to name.")
    found = extract_features(model, source, processor, columns=(label,), **loading)
    return classify(model, processor, source, found, label, prompts)


def classify(
    model: Any,
    processor: Any,
    source: ImageSource,
    found: Features,
    label: str,
    prompts: Prompts | None = None,
    more: Sequence[str] = (),
) -> Predictions:
    """`zero_shot_predict` from image features already extracted (with the column `label`).

    more: classes of the task that no picture of `source` may have, where its label column does not declare them.
    """
    values = found.labels[label]
    names = class_list(source, label, values)
    if declared_names(source, label) is None and not (prompts and prompts.classes):
        names = tuple(in_order((*names, *more)))
    if len(names) < 2:
        raise ValueError(f"Zero-shot classification needs at least 2 classes; column {label!r} holds {names}.")
    logits = F.normalize(found.embeddings, dim=1) @ class_embeddings(model, processor, names, prompts).T
    logits = logits * model.logit_scale.detach().float().exp().cpu()
    if getattr(model, "logit_bias", None) is not None:
        logits = logits + model.logit_bias.detach().float().cpu()
    p = logits.sigmoid() if "siglip" in model.config.model_type else logits.softmax(dim=1)
    number = {name: i for i, name in enumerate(names)}
    truth = [UNKNOWN if name is None else number[name] for name in names_of(values, declared_names(source, label))]
    return Predictions(p, torch.tensor(truth, dtype=torch.long), found.index, names, found.skipped)


def class_list(source: ImageSource, label: str, values: Sequence[Any] = ()) -> tuple[str, ...]:
    """The classes of a label column: a ClassLabel's names, else its distinct values (of a stream: `values`')."""
    if declared := declared_names(source, label):
        return declared
    found = values if source.is_stream else source.dataset.unique(label)
    return tuple(in_order(name for name in names_of(found) if name is not None))


def zero_shot(
    model: str | Path | nn.Module,
    processor: Any,
    source: Any,
    label: str | None = None,
    prompts: Prompts | None = None,
    **loading: Any,
) -> dict[str, float]:
    """{"top1", "top5" (only with more than 5 classes), "majority", "chance"} of `zero_shot_predict`, as fractions.

    "majority" is the accuracy of always naming the commonest class, "chance" one over the number of classes.
    """
    return zero_shot_accuracy(zero_shot_predict(model, processor, source, label, prompts, **loading))


def zero_shot_accuracy(found: Predictions) -> dict[str, float]:
    """The figures of `zero_shot`. Raises ValueError where no picture has a label."""
    known = found.labels != UNKNOWN
    if not known.any():
        raise ValueError("No picture has a label, so zero-shot accuracy cannot be told.")
    truth, classes = found.labels[known], found.probabilities.shape[1]
    ranking = found.probabilities[known].argsort(dim=1, descending=True, stable=True)
    hit = ranking[:, :5] == truth[:, None]
    scores = {"top1": hit[:, 0].double().mean().item()}
    if classes > 5:
        scores["top5"] = hit.any(dim=1).double().mean().item()
    return scores | {"majority": truth.bincount().max().item() / len(truth), "chance": 1 / classes}


# --- retrieval ----------------------------------------------------------------------------------------------------


def text_retrieval(
    model: str | Path | nn.Module,
    processor: Any,
    source: Any,
    k: Sequence[int] = RECALL_AT,
    canonical: bool = False,
    **loading: Any,
) -> dict[str, float]:
    """Do pictures find their texts and texts their pictures, among all of `source`?

    Candidates are the distinct texts of `source.captions(row)` (`canonical`: of its first ones only). A picture scores
    if ANY of its texts is among the k most similar, a text if any of its pictures is. Returns {"i2t_r1", "i2t_r5",
    "i2t_r10", "t2i_r1", ...}, the same keys with "_chance" (a random order's expectation), "images" and "texts".
    Raises ValueError for a model without a text tower or a source without texts.
    """
    source = load_source(source)
    model, processor, kind = load_native(model, processor, loading.get("device"))
    if kind != "image_text":
        raise ValueError(f"{type(model).__name__} has no text tower, so it cannot be searched by text.")
    if not getattr(source, "has_captions", False):
        raise ValueError(f"{source.name} ({source.split}) has no texts; name their column with caption_column.")
    found = extract_features(model, source, processor, captions=True, **loading)
    return retrieve(model, processor, found, k, canonical)


def retrieve(
    model: Any, processor: Any, found: Features, k: Sequence[int] = RECALL_AT, canonical: bool = False
) -> dict[str, float]:
    """`text_retrieval` from image features already extracted (with captions)."""
    texts = [own[:1] if canonical else own for own in found.labels[CAPTIONS]]
    candidates = list(dict.fromkeys(text for own in texts for text in own))
    if not candidates:
        raise ValueError("No picture has a text, so there is nothing to retrieve.")
    embeddings = embed_texts(model, processor, candidates)
    return recalls(F.normalize(found.embeddings, dim=1), embeddings, _numbered(texts, candidates), k)


def _numbered(texts: Sequence[Sequence[str]], candidates: Sequence[str]) -> list[set[int]]:
    number = {text: i for i, text in enumerate(candidates)}
    return [{number[text] for text in own} for own in texts]


def recalls(
    images: Tensor, texts: Tensor, pairs: Sequence[set[int]], k: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """The figures of `text_retrieval`: images (N, D), texts (T, D), unit; `pairs`: the right texts of each image."""
    images_of: list[set[int]] = [set() for _ in range(len(texts))]
    for image, own in enumerate(pairs):
        for text in own:
            images_of[text].add(image)
    result: dict[str, float] = {}
    for name, queries, bank, right in (("i2t", images, texts, pairs), ("t2i", texts, images, images_of)):
        asked = [i for i, own in enumerate(right) if own]  # a picture without a text asks nothing
        _, ranked = nearest(queries[asked], bank, min(max(k), len(bank)))
        hits = [[found in right[i] for found in row] for i, row in zip(asked, ranked.tolist(), strict=True)]
        for n in k:
            result[f"{name}_r{n}"] = sum(any(row[:n]) for row in hits) / len(asked)
        for n in k:
            chance = [_chance(len(bank), len(right[i]), n) for i in asked]
            result[f"{name}_r{n}_chance"] = sum(chance) / len(asked)
    return result | {"images": len(images), "texts": len(texts)}


def _chance(candidates: int, right: int, k: int) -> float:
    """Probability that k of `candidates`, drawn blindly, hold one of the `right` ones."""
    k = min(k, candidates)
    return 1 - math.comb(candidates - right, k) / math.comb(candidates, k)
