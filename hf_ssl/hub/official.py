"""Where official checkpoints keep their parts, one entry per method. Light: the command line reads it before torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Official:
    """One method's files, by the names that are left once wrappers (state_dict., module., …) are taken off.

    roots: prefix of the backbone by ``which`` copy it is, the evaluated one first. signs: patterns that a whole
    training checkpoint all matches; unlike: one that it does not. families: of ``natives``. heads: attention heads by
    width, where they are not 64 wide. args: official training argument -> our config field. title, arxiv: of methods
    that have no model file here yet.
    """

    name: str
    families: tuple[str, ...]
    roots: dict[str, str] = field(default_factory=dict)
    signs: tuple[str, ...] = ()
    unlike: str = "^$"
    heads: dict[int, int] = field(default_factory=dict)
    args: dict[str, str] = field(default_factory=dict)
    title: str = ""
    arxiv: str = ""

    def looks_like(self, names: Iterable[str]) -> bool:
        """Whether tensors of these names are a whole training checkpoint of this method."""
        names = list(names)
        found = all(any(re.search(sign, name) for name in names) for sign in self.signs)
        return bool(self.signs) and found and not any(re.search(self.unlike, name) for name in names)


_CONVNETS, _BOTH = ("resnet",), ("vit", "resnet")
_STUDENTS = {"teacher": "teacher.backbone.", "student": "student.backbone."}

# What official releases hold is what their evaluation code loads: eval_linear.py, main_lincls.py, hubconf.py, …
OFFICIAL: dict[str, Official] = {
    "backbone": Official("a backbone", ("vit", "dinov2", "ijepa", "resnet"), {"student": "", "teacher": "ema."}),
    "barlow_twins": Official(
        "Barlow Twins",
        _CONVNETS,
        {"student": "backbone."},
        (r"^backbone\.", r"^projector\.", r"^bn\.running_mean"),
        title="Barlow Twins: Self-Supervised Learning via Redundancy Reduction",
        arxiv="2103.03230",
    ),
    "dino": Official(
        "DINO",
        _BOTH,
        _STUDENTS,
        (r"^(student|teacher)\.backbone\.", r"^(student|teacher)\.head\.last_layer\."),
        r"last_layer2|masked_embed|ls1\.gamma",
        args={
            "norm_last_layer": "norm_last_layer",
            "momentum_teacher": "teacher_momentum",
            "teacher_temp": "teacher_temperature",
            "warmup_teacher_temp": "warmup_teacher_temperature",
        },
    ),
    "dinov2": Official(
        "DINOv2",
        ("dinov2",),
        _STUDENTS,
        (r"ls1\.gamma$", r"(^|\.)mask_token$"),
        title="DINOv2: Learning Robust Visual Features without Supervision",
        arxiv="2304.07193",
    ),
    "ibot": Official(
        "iBOT",
        ("vit",),
        _STUDENTS,
        (r"^(student|teacher)\.backbone\.", r"last_layer2|masked_embed"),
        title="iBOT: Image BERT Pre-Training with Online Tokenizer",
        arxiv="2111.07832",
    ),
    "ijepa": Official(
        "I-JEPA",
        ("ijepa",),
        {"teacher": "target_encoder.", "student": "encoder."},
        (r"^(target_)?encoder\.patch_embed", r"^predictor\.predictor_"),
        title="Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture",
        arxiv="2301.08243",
    ),
    "mae": Official(
        "MAE",
        ("vit",),
        signs=(r"^decoder_blocks\.", r"^mask_token$"),
        args={"mask_ratio": "mask_ratio", "norm_pix_loss": "norm_pix_loss"},
    ),
    "moco_v2": Official(
        "MoCo v2",
        _CONVNETS,
        {"student": "encoder_q.", "teacher": "encoder_k."},
        (r"^encoder_q\.",),
        title="Improved Baselines with Momentum Contrastive Learning",
        arxiv="2003.04297",
    ),
    "moco_v3": Official(
        "MoCo v3",
        _BOTH,
        {"student": "base_encoder.", "teacher": "momentum_encoder."},
        (r"^base_encoder\.",),
        heads={384: 12},  # its ViT-S has twelve
        title="An Empirical Study of Training Self-Supervised Vision Transformers",
        arxiv="2104.02057",
    ),
    "simclr": Official(
        "SimCLR",
        _BOTH,
        {"student": "backbone."},
        (r"^(projector|projection_head\.layers)\.4\.running_mean",),
        r"^projector\.6\.weight$|^bn\.|^prototypes",
    ),
    "swav": Official(
        "SwAV",
        _CONVNETS,
        signs=(r"^projection_head\.", r"^prototypes\."),
        title="Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
        arxiv="2006.09882",
    ),
    "vicreg": Official(
        "VICReg",
        _CONVNETS,
        {"student": "backbone."},
        (r"^backbone\.", r"^projector\.6\.weight$"),
        r"^projector\.(7|8|9)\.|^bn\.",
        title="VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
        arxiv="2105.04906",
    ),
}
