"""evaluate-library metric: RankMe, the effective rank of features. Load it by this folder's path."""

import datasets
import evaluate

from hf_ssl.evaluation.health import rankme


class RankMe(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="exp of the entropy of the un-centred features' singular values: 1 (collapsed) to min(N, D).",
            citation="Garrido et al. 2023, arXiv:2210.02885",
            inputs_description='predictions: features, N lists of D floats. Returns {"rankme": float}.',
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _compute(self, predictions):
        return {"rankme": rankme(predictions)}
