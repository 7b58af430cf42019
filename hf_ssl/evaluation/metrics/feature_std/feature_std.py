"""evaluate-library metric: spread of features over the sphere. Load it by this folder's path."""

import datasets
import evaluate

from hf_ssl.evaluation.health import feature_std


class FeatureStd(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Mean per-channel std of L2-normalised features: 0 (collapsed) to about 1/sqrt(D).",
            citation="Chen and He 2021, arXiv:2011.10566",
            inputs_description='predictions: features, N lists of D floats. Returns {"feature_std": float}.',
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _compute(self, predictions):
        return {"feature_std": feature_std(predictions)}
