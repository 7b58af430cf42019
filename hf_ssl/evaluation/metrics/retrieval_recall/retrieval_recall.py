"""evaluate-library metric: recall@k of retrieval by cosine similarity. Load it by this folder's path."""

import datasets
import evaluate

from hf_ssl.evaluation.knn import retrieval_recall

_INPUTS = """
predictions: features of the queries, M lists of D floats.
references: their M ids.
gallery (N, D), gallery_ids (N): what is searched.
k: ranks, default (1, 5).
Returns {"r1": fraction, "r5": fraction}.
"""


class RetrievalRecall(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Share of queries whose own item is among the k most similar gallery items.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, gallery, gallery_ids, k=(1, 5)):
        return retrieval_recall(predictions, gallery, references, gallery_ids, k=k)
