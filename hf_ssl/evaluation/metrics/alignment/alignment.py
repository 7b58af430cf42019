"""evaluate-library metric: distance between features of two views. Load it by this folder's path."""

import datasets
import evaluate

from hf_ssl.evaluation.health import alignment

_VECTOR = datasets.Sequence(datasets.Value("float32"))


class Alignment(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Mean squared distance between L2-normalised features of two views; 0 is perfect.",
            citation="Wang and Isola 2020, arXiv:2005.10242",
            inputs_description="predictions, references: features of the two views, N lists of D floats each. "
            'Returns {"alignment": float}.',
            features=datasets.Features({"predictions": _VECTOR, "references": _VECTOR}),
        )

    def _compute(self, predictions, references):
        return {"alignment": alignment(predictions, references)}
