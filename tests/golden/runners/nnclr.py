import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl.losses import nt_xent
from hf_ssl.methods.joint_embedding.nnclr import NNCLRConfig, NNCLRForPreTraining, nearest
from tests.golden.harness import Case, gradients, runner
from tests.golden.runners.dino import small_vit


@runner("nnclr/loss")
def loss(case: Case) -> dict[str, Tensor]:
    c = case.config
    config = NNCLRConfig(
        backbone_config=small_vit(8), projection_dim=c["D"], hidden_dim=8, predictor_hidden_dim=8, queue_size=c["Q"],
        temperature=c["temperature"],
    )  # fmt: skip
    model = NNCLRForPreTraining(config).train()
    model.queue.rows.copy_(case.input("queue"))
    model.queue.pointer.fill_(c["ptr"])
    projected = [case.input(f"z{view}") for view in (0, 1)]
    predicted = [case.input(f"p{view}").requires_grad_() for view in (0, 1)]
    places = [nearest(F.normalize(rows, dim=1), model.queue.rows) for rows in projected]
    neighbours = [model.queue.rows[place].clone() for place in places]
    value, _ = model.compare(torch.cat(projected), torch.cat(predicted))
    got = {f"nn_idx{view}": places[view] for view in (0, 1)} | {f"nn{view}": neighbours[view] for view in (0, 1)}
    got |= {"loss": value, **{f"grad.{k}": g for k, g in gradients(value, p0=predicted[0], p1=predicted[1]).items()}}
    model.after_optimizer_step()
    got |= {"queue_after": model.queue.rows, "queue_ptr_after": model.queue.pointer.view(1)}
    # lightly's loss, which is not the paper's and not ours: our NT-Xent of its inputs
    other = [nt_xent(neighbours[view], predicted[1 - view], c["temperature"])[0] for view in (0, 1)]
    return got | {"lightly_variant.loss": torch.stack(other).mean()}
