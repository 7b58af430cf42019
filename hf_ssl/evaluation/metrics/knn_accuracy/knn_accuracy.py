"""evaluate-library metric: weighted kNN accuracy of frozen features (DINO's rule). Load it by this folder's path."""

import datasets
import evaluate

from hf_ssl.evaluation.knn import knn_accuracy

_INPUTS = """
predictions: features of the test images, M lists of D floats.
references: their M class numbers.
train_features (N, D), train_labels (N): the bank of labelled neighbours.
k: neighbour counts, default (20, 200). temperature: default 0.07.
Returns {"knn20_top1": fraction, "knn20_top5": fraction, ...}.
"""


class KNNAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Accuracy of a k-nearest-neighbour classifier on frozen features.",
            citation="Wu et al. 2018, arXiv:1805.01978; Caron et al. 2021, arXiv:2104.14294",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, train_features, train_labels, k=(20, 200), temperature=0.07):
        return knn_accuracy(train_features, train_labels, predictions, references, k=k, temperature=temperature)
