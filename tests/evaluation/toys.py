"""A tiny native classifier with random weights, its image processor, and labelled pictures of noise."""

import io

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import BitImageProcessor, ResNetConfig, ResNetForImageClassification

from hf_ssl.data.sources import ImageSource

NAMES = ["red", "green", "blue"]


def processor():
    square = {"height": 16, "width": 16}
    return BitImageProcessor(size={"shortest_edge": 16}, crop_size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def classifier(names=NAMES, count=None, seed=0):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config.num_labels = count or len(names)
    if names is not None:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    torch.manual_seed(seed)
    return ResNetForImageClassification(config).eval()


def pictures(labels, feature=None, bad=()):
    """A source of noise pictures with that label column; rows in `bad` hold no picture."""
    rng, rows = np.random.default_rng(0), []
    for i in range(len(labels)):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
        rows.append({"bytes": b"no picture" if i in bad else buffer.getvalue(), "path": f"{i}.png"})
    features = datasets.Features(image=datasets.Image(decode=False), label=feature or datasets.Value("int64"))
    return ImageSource(
        "toys", datasets.Dataset.from_dict({"image": rows, "label": labels}, features), "test", ("label",)
    )
