import torch
from torch import Tensor, nn

from hf_ssl import backbones, schedules
from hf_ssl.methods.joint_embedding.dino import DINOConfig, DINOForPreTraining
from hf_ssl.training.optim import clip_per_tensor, decay_names
from tests.golden.harness import Case, gradients, runner
from tests.golden.runners import vit


def model_with_head(head: dict, backbone: dict) -> DINOForPreTraining:
    """DINO with the head of the official constructor's arguments."""
    return DINOForPreTraining(
        DINOConfig(
            backbone_config=backbone,
            out_dim=head["out_dim"],
            hidden_dim=head.get("hidden_dim", 2048),
            bottleneck_dim=head.get("bottleneck_dim", 256),
            num_layers=head.get("nlayers", 3),
            use_bn_in_head=head.get("use_bn", False),
            norm_last_layer=head.get("norm_last_layer", True),
        )
    )


def small_vit(width: int) -> dict:
    return vit.config(
        {"img_size": 16, "patch_size": 8, "embed_dim": width, "depth": 1, "num_heads": 1, "mlp_ratio": 1}, 1e-6
    )


@runner("dino/head")
def head(case: Case) -> dict[str, Tensor]:
    settings = case.config["head"]
    model = model_with_head(settings, small_vit(settings["in_dim"])).train(case.config.get("train", True))
    module = model.head
    state = module.state_dict()
    weights = case.part("weight")
    assert {name for name, _ in module.named_parameters()} <= set(weights) <= set(state), set(weights) ^ set(state)
    module.load_state_dict({**state, **weights})  # BatchNorm's buffers may be left at their start values
    x = case.input("x").requires_grad_()
    output = module(x)
    (output * case.input("cotangent")).sum().backward()
    got = {"output": output, "grad.x": x.grad}
    got |= {f"grad.{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    for name, buffer in module.named_buffers():  # BatchNorm's statistics after the pass, under whatever prefix
        got |= {key: buffer for key in case.expected if key == name or key.endswith("." + name)}
    return got


@runner("dino/loss")
def loss(case: Case) -> dict[str, Tensor]:
    settings, batch = case.config["loss"], case.config["batch"]
    model = DINOForPreTraining(
        DINOConfig(
            backbone_config=small_vit(8),
            out_dim=settings["out_dim"],
            hidden_dim=8,
            bottleneck_dim=8,
            student_temperature=settings.get("student_temp", 0.1),
            teacher_temperature=settings["teacher_temp"],
            warmup_teacher_temperature=settings["warmup_teacher_temp"],
            teacher_temperature_warmup=warmup_share(settings["warmup_teacher_temp_epochs"], settings["nepochs"]),
            center_momentum=settings.get("center_momentum", 0.9),
        )
    ).train()
    model.total_steps.fill_(settings["nepochs"])  # the official schedule moves once per epoch: one step is one epoch
    model.center.value.copy_(case.input("center0"))
    got = {}
    for step, epoch in enumerate(case.config["epochs"]):
        model.step.fill_(epoch)
        student = case.input(f"step{step}.student").requires_grad_()
        value, _ = model.distil(student, case.input(f"step{step}.teacher"), batch)
        got[f"step{step}.loss"] = value
        got[f"grad.step{step}.student"] = gradients(value, student=student)["student"]
        model.after_optimizer_step()
        got[f"step{step}.center"] = model.center.value.clone()
    temperatures = []
    for epoch in range(settings["nepochs"]):
        model.step.fill_(epoch)
        temperatures.append(model.teacher_temperature())
    return got | {"teacher_temp_schedule": torch.stack([torch.as_tensor(t) for t in temperatures])}


def warmup_share(warmup_epochs: int, epochs: int) -> float:
    """The official warm-up of w epochs reaches its end in epoch w − 1."""
    return max(warmup_epochs - 1, 1e-6) / epochs if warmup_epochs else 0.0


@runner("dino/vit")
def transformer(case: Case) -> dict[str, Tensor]:
    model = backbones.build(vit.native_config(case.config["vit"], case.config["ln_eps"])).eval()
    vit.load(model, case.part("weight"))
    backbones.set_position_offset(model, 0.1)
    got = {}
    for index in range(len(case.config["sizes"])):
        images = case.input(f"images{index}")
        features = backbones.features(model, images)
        positions = model.embeddings.position_embeddings
        grid = tuple(side // model.config.patch_size for side in images.shape[-2:])
        with torch.no_grad():
            tokens = torch.cat([features[:, None], backbones.patch_tokens(model, images)], dim=1)
            implementation = model.config._attn_implementation
            model.set_attn_implementation("eager")
            attention = model(images, interpolate_pos_encoding=True, output_attentions=True).attentions[-1]
            model.set_attn_implementation(implementation)
            assert torch.allclose(backbones.last_attention(model, images), attention[:, :, 0, 1:], atol=1e-6)
        got |= {
            f"cls{index}": features,
            f"tokens{index}": tokens,
            f"last_attention{index}": attention,
            f"pos_embed{index}": backbones.interpolate_positions(positions, grid, 1, 0.1),
            f"grad.pos_embed{index}": gradients(features.square().sum(), table=positions)["table"],
        }
    return got


@runner("dino/param_groups")
def param_groups(case: Case) -> dict[str, Tensor]:
    backbone = vit.config(case.config["vit"], case.config["ln_eps"])
    model = model_with_head(case.config["head"], backbone)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = decay_names(model, tokens=True)
    groups = []
    for official in case.config["parameter_names"]:
        part, name = official.split(".", 1)
        ours = [f"backbone.{n}" for n in vit.native_names(name)] if part == "backbone" else [official]
        found = {-1 if n not in trainable else 0 if n in decayed else 1 for n in ours}
        assert len(found) == 1, f"{official} is split into groups {found}"
        groups += found
    assert len(groups) == len(case.config["parameter_names"])
    return {"group": torch.tensor(groups)}


@runner("dino/clip_gradients")
def clip_gradients(case: Case) -> dict[str, Tensor]:
    parameters = {}
    for index, shape in enumerate(case.config["shapes"]):
        parameters[f"p{index}"] = nn.Parameter(torch.zeros(shape))
        parameters[f"p{index}"].grad = case.input(f"p{index}")
    norms = clip_per_tensor(parameters.values(), case.config["clip"])
    return {"norms": norms, **{f"grad.{name}": parameter.grad for name, parameter in parameters.items()}}


@runner("dino/cosine_scheduler")
def cosine_scheduler(case: Case) -> dict[str, Tensor]:
    """One value per iteration. Ours are functions of progress; the learning rate's is transformers' own scheduler."""
    got = {}
    for index, call in enumerate(case.config["calls"]):
        steps = call["epochs"] * call["niter_per_ep"]
        warmup = call.get("warmup_epochs", 0) * call["niter_per_ep"]
        base, final = call["base_value"], call["final_value"]
        rise = [  # the official warm-up includes both of its ends
            schedules.linear(i / max(warmup - 1, 1), call.get("start_warmup_value", 0), base) for i in range(warmup)
        ]
        fall = [schedules.cosine(i / (steps - warmup), base, final) for i in range(steps - warmup)]
        got[f"schedule{index}"] = torch.tensor(rise + fall, dtype=torch.float64)
        if final < base:  # a learning rate
            trainer = trainer_schedule(base, final, warmup, steps)
            assert torch.allclose(trainer[warmup:], got[f"schedule{index}"][warmup:], rtol=1e-6, atol=1e-9)
    return got


def trainer_schedule(peak: float, end: float, warmup: int, steps: int) -> Tensor:
    """What SSLTrainer sets at each step (``lr_scheduler_type="cosine_with_min_lr"``)."""
    shape = schedules.LEARNING_RATES["cosine_with_min_lr"]
    rates = [shape(step / steps, peak, end, warmup / steps) for step in range(steps)]
    return torch.tensor(rates, dtype=torch.float64)
