"""evaluate-library metric: accuracy of a linear probe on frozen features. Load it by this folder's path."""

import datasets
import evaluate

from hf_ssl.evaluation.linear import linear_probe

_INPUTS = """
predictions: features of the test images, M lists of D floats.
references: their M class numbers.
train_features (N, D), train_labels (N): what the probe is fitted on; its strength is chosen on a held-out part of
them. solver: "lbfgs" (default) or "sgd".
Returns {"top1": fraction, "top5": fraction, "chosen": strength or rate, "holdout_top1": fraction, "solver": name}.
"""


class LinearProbe(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Accuracy of a linear classifier fitted on frozen features.",
            citation="Kornblith et al. 2019, arXiv:1805.08974",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, train_features, train_labels, solver="lbfgs", seed=0):
        return linear_probe(train_features, train_labels, predictions, references, solver=solver, seed=seed)
