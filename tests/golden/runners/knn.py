import torch
from torch import Tensor

from hf_ssl.evaluation import knn_accuracy
from tests.golden.harness import Case, runner


@runner("knn/dino_knn")
def dino_knn(case: Case) -> dict[str, Tensor]:
    scores = knn_accuracy(
        *(case.input(name) for name in ("train_features", "train_labels", "test_features", "test_labels")),
        k=case.config["ks"],
        temperature=case.config["T"],
        num_classes=case.config["num_classes"],
        fill=True,
    )
    percent = {name: torch.tensor(100 * value) for name, value in scores.items()}  # ours: knn20_top1, as a fraction
    return {name.replace("knn", "k").replace("_", "."): value for name, value in percent.items()}
