"""evaluate-library metric: Jaccard of attention at 60 % mass with foreground masks. Load it by this folder's path."""

import datasets
import evaluate
import torch

from hf_ssl.evaluation.segmentation import attention_jaccard

_INPUTS = """
predictions: class-token attention to the patches, B pictures x heads x N patches (row-major).
references: foreground masks, B pictures x H x W of 0 and 1.
mass: share of the attention kept, default 0.6.
Returns {"jaccard_best": mean of the best head per picture, "jaccard_mean": mean over pictures and heads}.
"""


class AttentionJaccard(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Intersection over union of the most attended patches with the object.",
            citation="Caron et al. 2021, arXiv:2104.14294",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
                    "references": datasets.Sequence(datasets.Sequence(datasets.Value("int64"))),
                }
            ),
        )

    def _compute(self, predictions, references, mass=0.6):
        jaccard = attention_jaccard(torch.as_tensor(predictions), torch.as_tensor(references).bool(), mass)
        return {"jaccard_best": jaccard.max(dim=1).values.mean().item(), "jaccard_mean": jaccard.mean().item()}
