"""One file per method, by family. ``METHODS`` names them and imports nothing heavy; ``load`` imports one."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..modeling import SSLModel

# family (the folder) -> command-line name (the file) -> stem of the class names: <stem>Config, <stem>ImageProcessor,
# <stem>ForPreTraining
FAMILIES: dict[str, dict[str, str]] = {
    "joint_embedding": {
        "barlow_twins": "BarlowTwins",
        "byol": "BYOL",
        "dcl": "DCL",
        "deepcluster_v2": "DeepClusterV2",
        "dino": "DINO",
        "dinov2": "SSLDINOv2",
        "dinov3": "SSLDINOv3",
        "infomin": "InfoMin",
        "instdisc": "InstDisc",
        "lejepa": "LeJEPA",
        "moco": "MoCo",
        "mocov3": "MoCoV3",
        "msn": "MSN",
        "nnclr": "NNCLR",
        "obow": "OBoW",
        "pirl": "PIRL",
        "pmsn": "PMSN",
        "ressl": "ReSSL",
        "sela_v2": "SeLaV2",
        "simclr": "SimCLR",
        "simclr_v2": "SimCLRv2",
        "simsiam": "SimSiam",
        "swav": "SwAV",
        "tico": "TiCo",
        "vicreg": "VICReg",
        "vicregl": "VICRegL",
        "w_mse": "WMSE",
    },
    "masked": {
        "mae": "MAE",
    },
    "image_text": {
        "clip": "SSLCLIP",
    },
    "semi_supervised": {
        "fixmatch": "FixMatch",
    },
}
# command-line name -> (module, stem of the class names)
METHODS: dict[str, tuple[str, str]] = {
    name: (f"hf_ssl.methods.{family}.{name}", stem)
    for family, name, stem in sorted(
        ((family, name, stem) for family, methods in FAMILIES.items() for name, stem in methods.items()),
        key=lambda row: row[1],
    )
}


def load(name: str) -> "type[SSLModel]":
    """The model class of a method by its command-line name; KeyError-free: a ValueError that lists the methods."""
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; there are: {', '.join(METHODS)}")
    module, stem = METHODS[name]
    return getattr(importlib.import_module(module), f"{stem}ForPreTraining")


def family_of(name: str) -> str:
    """The folder that a method's file lies in, by its command-line name."""
    return METHODS[name][0].split(".")[2]


def name_of(model_type: str) -> str:
    """The command-line name of a config's ``model_type``."""
    return model_type.removeprefix("ssl_")
