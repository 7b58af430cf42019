import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl.methods.joint_embedding.instdisc import InstDiscConfig, InstDiscForPreTraining, nce
from tests.golden.harness import Case, gradients, runner
from tests.golden.runners.dino import small_vit


def model_of(case: Case, negatives: int) -> InstDiscForPreTraining:
    c = case.config
    config = InstDiscConfig(
        backbone_config=small_vit(8), num_examples=c["N"], projection_dim=c["D"], temperature=c["T"],
        bank_momentum=c["momentum"], nce_negatives=negatives,
    )  # fmt: skip
    model = InstDiscForPreTraining(config).train()
    model.bank.rows.copy_(case.input("memory"))
    return model


@runner("instdisc/nce")
def noise_contrastive(case: Case) -> dict[str, Tensor]:
    model, got = model_of(case, case.config["K"]), {}
    for step in range(case.config["steps"]):
        rows, index = case.input(f"step{step}.x").requires_grad_(), case.input(f"step{step}.y")
        noise = case.input(f"step{step}.noise_idx")[:, 1:]
        logits, _ = model.logits(rows, index, noise)
        probabilities = model.probabilities(logits)
        loss, _ = model.discriminate(rows, index, noise)
        assert torch.allclose(loss, nce(probabilities, case.config["N"]).mean())
        model.remember(index, rows)
        got |= {f"step{step}.probs": probabilities, f"step{step}.loss": loss, f"step{step}.Z": model.partition.clone()}
        got[f"grad.step{step}.x"] = gradients(loss, x=rows)["x"]
        model.after_optimizer_step()
        got[f"step{step}.memory"] = model.bank.rows.clone()
    return got


@runner("instdisc/softmax")
def softmax(case: Case) -> dict[str, Tensor]:
    model, got = model_of(case, 0), {}
    for step in range(case.config["steps"]):
        rows, index = case.input(f"step{step}.x").requires_grad_(), case.input(f"step{step}.y")
        logits, target = model.logits(rows, index)
        loss, _ = model.discriminate(rows, index)
        assert torch.allclose(loss, F.cross_entropy(logits, target))
        model.remember(index, rows)
        got |= {f"step{step}.logits": logits, f"step{step}.loss": loss}
        got[f"grad.step{step}.x"] = gradients(loss, x=rows)["x"]
        model.after_optimizer_step()
        got[f"step{step}.memory"] = model.bank.rows.clone()
    return got
