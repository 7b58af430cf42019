"""evaluate-library metric: uniformity of features on the sphere. Load it by this folder's path."""

import datasets
import evaluate

from hf_ssl.evaluation.health import uniformity


class Uniformity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="log mean exp(-2 d^2) over pairs of L2-normalised features: 0 (collapsed) to about -4.",
            citation="Wang and Isola 2020, arXiv:2005.10242",
            inputs_description='predictions: features, N lists of D floats. Returns {"uniformity": float}.',
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _compute(self, predictions):
        return {"uniformity": uniformity(predictions)}
