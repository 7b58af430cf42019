"""One file per method. ``METHODS`` names them without importing anything heavy; ``load`` imports one."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..modeling import SSLModel

# command-line name -> (module, stem of the class names: <stem>Config, <stem>ImageProcessor, <stem>ForPreTraining)
METHODS: dict[str, tuple[str, str]] = {
    "barlow_twins": ("hf_ssl.methods.joint_embedding.barlow_twins", "BarlowTwins"),
    "byol": ("hf_ssl.methods.joint_embedding.byol", "BYOL"),
    "clip": ("hf_ssl.methods.image_text.clip", "SSLCLIP"),
    "dcl": ("hf_ssl.methods.joint_embedding.dcl", "DCL"),
    "deepcluster_v2": ("hf_ssl.methods.joint_embedding.deepcluster_v2", "DeepClusterV2"),
    "dino": ("hf_ssl.methods.joint_embedding.dino", "DINO"),
    "dinov2": ("hf_ssl.methods.joint_embedding.dinov2", "SSLDINOv2"),
    "dinov3": ("hf_ssl.methods.joint_embedding.dinov3", "SSLDINOv3"),
    "fixmatch": ("hf_ssl.methods.semi_supervised.fixmatch", "FixMatch"),
    "infomin": ("hf_ssl.methods.joint_embedding.infomin", "InfoMin"),
    "instdisc": ("hf_ssl.methods.joint_embedding.instdisc", "InstDisc"),
    "lejepa": ("hf_ssl.methods.joint_embedding.lejepa", "LeJEPA"),
    "mae": ("hf_ssl.methods.masked.mae", "MAE"),
    "moco": ("hf_ssl.methods.joint_embedding.moco", "MoCo"),
    "mocov3": ("hf_ssl.methods.joint_embedding.mocov3", "MoCoV3"),
    "msn": ("hf_ssl.methods.joint_embedding.msn", "MSN"),
    "nnclr": ("hf_ssl.methods.joint_embedding.nnclr", "NNCLR"),
    "obow": ("hf_ssl.methods.joint_embedding.obow", "OBoW"),
    "pirl": ("hf_ssl.methods.joint_embedding.pirl", "PIRL"),
    "pmsn": ("hf_ssl.methods.joint_embedding.pmsn", "PMSN"),
    "ressl": ("hf_ssl.methods.joint_embedding.ressl", "ReSSL"),
    "sela_v2": ("hf_ssl.methods.joint_embedding.sela_v2", "SeLaV2"),
    "simclr": ("hf_ssl.methods.joint_embedding.simclr", "SimCLR"),
    "simclr_v2": ("hf_ssl.methods.joint_embedding.simclr_v2", "SimCLRv2"),
    "simsiam": ("hf_ssl.methods.joint_embedding.simsiam", "SimSiam"),
    "swav": ("hf_ssl.methods.joint_embedding.swav", "SwAV"),
    "tico": ("hf_ssl.methods.joint_embedding.tico", "TiCo"),
    "vicreg": ("hf_ssl.methods.joint_embedding.vicreg", "VICReg"),
    "vicregl": ("hf_ssl.methods.joint_embedding.vicregl", "VICRegL"),
    "w_mse": ("hf_ssl.methods.joint_embedding.w_mse", "WMSE"),
}


def load(name: str) -> "type[SSLModel]":
    """The model class of a method by its command-line name; KeyError-free: a ValueError that lists the methods."""
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; there are: {', '.join(METHODS)}")
    module, stem = METHODS[name]
    return getattr(importlib.import_module(module), f"{stem}ForPreTraining")


def name_of(model_type: str) -> str:
    """The command-line name of a config's ``model_type``."""
    return model_type.removeprefix("ssl_")
