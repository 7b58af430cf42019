"""FSDP2's sharded parameters go through the same step as plain ones: loss, clipping, EMA and centre agree.

Accelerate offers no FSDP on CPU processes: torch's ``fully_shard`` is applied here as Accelerate would on GPUs.
"""

import copy
import os
import sys
import traceback

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_ssl import DINOConfig, DINOForPreTraining
from hf_ssl.training.optim import clip_per_tensor

from .conftest import in_child
from .test_trainer import VIT


def steps(model, images, count=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses, norms = [], []
    for _ in range(count):
        loss = model(images).loss
        loss.backward()
        norms.append(clip_per_tensor(model.parameters(), 0.05))
        optimizer.step()
        optimizer.zero_grad()
        model.after_optimizer_step(0.1)
        losses.append(loss.detach().clone())
    return losses, norms


def compare(rank: int) -> None:
    torch.manual_seed(0)
    config = DINOConfig(backbone_config=VIT, out_dim=8, hidden_dim=8, bottleneck_dim=4, freeze_last_layer=0)
    plain = DINOForPreTraining(config)
    sharded = copy.deepcopy(plain).train()
    images = torch.randn(4, 2, 3, 16, 16)
    losses, norms = steps(plain.train(), images)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for layer in [*sharded.backbone.layers, *sharded.teacher_backbone.layers]:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    own_losses, own_norms = steps(sharded, images[rank * 2 : rank * 2 + 2])
    for loss, own, norm, own_norm in zip(losses, own_losses, norms, own_norms):
        dist.all_reduce(own)
        torch.testing.assert_close(own / 2, loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own_norm, norm, rtol=1e-4, atol=1e-4)
    whole = plain.state_dict()
    for name, value in sharded.state_dict().items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5, msg=name)
    dist.destroy_process_group()


def test_fsdp2_step_equals_the_plain_step():

    def two_ranks():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29500 + os.getpid() % 2000), WORLD_SIZE="2")
        second = os.fork()
        os.environ["RANK"] = "1" if second == 0 else "0"
        try:
            compare(int(os.environ["RANK"]))
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            code = 1
        if second == 0:
            os._exit(code)
        _, status = os.waitpid(second, 0)
        os._exit(code or os.waitstatus_to_exitcode(status))

    assert in_child(two_ranks) == 0
