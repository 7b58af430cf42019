"""The contract: what every method of hf_ssl.methods.METHODS keeps, on its tiny setting."""

import copy
import dataclasses
import traceback

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForPreTraining

from hf_ssl.methods import METHODS, family_of, load
from hf_ssl.modeling import SSLConfig, SSLModel
from hf_ssl.training.optim import clip_per_tensor
from tests.contract.tiny import RESNET, TINY, VIT, adamw, batch, build, make_config, processor, students, train_step

every_method = pytest.mark.parametrize("name", sorted(METHODS))


def test_every_method_has_a_tiny_setting() -> None:
    assert set(TINY) == set(METHODS)


@every_method
def test_the_class_says_what_it_is(name: str) -> None:
    model = load(name)
    assert issubclass(model, SSLModel) and issubclass(model.config_class, SSLConfig)
    assert model.config_class.model_type == f"ssl_{name}"
    assert all(dataclasses.astuple(model.paper)), model.paper
    assert family_of(name) == model.__module__.split(".")[2]
    assert model.lr_scaling[0] in ("linear", "sqrt", "none") and model.default_arguments
    assert model.accepts_loss_kwargs is False  # else Trainer multiplies the gradient by the accumulation steps


@every_method
def test_gradient_reaches_the_student_and_nothing_else(name: str) -> None:
    model = build(name)
    output = model(**batch(name))
    assert output.loss.ndim == 0 and output.loss.isfinite()
    output.loss.backward()
    silent = (*TINY[name].no_gradient, "k_proj.bias")  # a constant added to every score changes no softmax
    for key, parameter in students(model).items():
        if key.endswith(TINY[name].no_gradient):
            assert parameter.grad is None, f"{key} should be frozen"
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
            assert key.endswith(silent) or parameter.grad.abs().max() > 0, f"no gradient reaches {key}"
    for _, teacher in model.teachers():
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@every_method
def test_metrics_are_detached_scalars_or_vectors(name: str) -> None:
    metrics = build(name)(**batch(name)).metrics or {}
    assert all(value.ndim <= 1 and not value.requires_grad and value.isfinite().all() for value in metrics.values())


@every_method
def test_one_view_without_labels_gives_embeddings_only(name: str) -> None:
    model = build(name).eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        output = model(images)
        assert output.loss is None and output.embeddings.shape == (3, 16)
        assert torch.equal(output.embeddings, model.features(images))
        assert torch.equal(model(images).embeddings, output.embeddings)  # no mask, no dropout: no randomness
        assert model.patch_tokens(images).shape == (3, 16, 16)


@every_method
@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_any_number_of_channels(name: str, channels: int) -> None:
    views = batch(name, 2, num_channels=channels)
    assert build(name, {**VIT, "num_channels": channels})(**views).loss.isfinite()


@every_method
def test_images_of_other_sizes(name: str) -> None:
    """A position table for 16×16 px serves 24×24 and 8×16; a table that is not square serves its own size."""
    model = build(name)
    for size in (24, [8, 16]):
        assert model(**batch(name, 2, size=size)).loss.isfinite()
    wide = build(name, {**VIT, "image_size": [8, 16]})
    views = {key: value for key, value in batch(name, 2, size=[8, 16]).items() if key != "local_pixel_values"}
    wide(**views).loss.backward()
    assert wide.features(torch.randn(2, 3, 8, 16)).shape == (2, 16)


@every_method
def test_the_next_step_after_loading_is_bit_equal(name: str, tmp_path) -> None:
    model = build(name)
    model.total_steps.fill_(10)
    optimizer = adamw(model)
    for step in range(2):
        train_step(model, optimizer, batch(name, seed=step))
    model(**batch(name, seed=5))  # in the middle of an accumulation window: half-filled sums are state as well
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    losses = [train_step(model, optimizer, batch(name, seed=9))]

    again = load(name).from_pretrained(tmp_path).train()
    optimizer = adamw(again)
    optimizer.load_state_dict(state)
    losses.append(train_step(again, optimizer, batch(name, seed=9)))
    assert torch.equal(*losses)
    expected = model.state_dict()
    assert set(expected) == set(again.state_dict())
    for key, value in again.state_dict().items():
        assert torch.equal(value, expected[key]), key


@every_method
def test_buffers_are_saved(name: str) -> None:
    model = build(name)
    lost = {key for key, _ in model.named_buffers()} - set(model.state_dict())
    lost = {key for key in lost if not key.endswith("position_ids")}  # 0, 1, 2, ...: transformers' constants
    assert not lost, f"not in the checkpoint, hence lost on resume: {lost}"


@every_method
def test_teacher_is_a_frozen_copy_from_the_start_and_after_loading(name: str, tmp_path) -> None:
    model = build(name, seed=3)
    model.save_pretrained(tmp_path)
    fresh = load(name)(model.config)  # never told its mode
    for candidate in (
        fresh,
        model,
        load(name).from_pretrained(tmp_path),
        load(name).from_pretrained(tmp_path).train(),
    ):
        frozen = {id(parameter) for parameter in candidate.frozen_parameters()}
        for key, parameter in students(candidate).items():
            assert parameter.requires_grad == (id(parameter) not in frozen), key
        for student, teacher in candidate.teachers():
            mine = {tensor.data_ptr() for tensor in student.state_dict().values()}
            assert not mine & {tensor.data_ptr() for tensor in teacher.state_dict().values()}
            assert not any(parameter.requires_grad for parameter in teacher.parameters())
            for key, value in teacher.state_dict().items():
                assert torch.equal(value, student.state_dict()[key]), key
            idle = [m for m in teacher.modules() if not isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
            assert not any(module.training for module in idle)


@every_method
def test_teacher_follows_once_per_optimiser_step(name: str) -> None:
    """Two micro-batches, one optimiser step: one update with the momentum of this point of the run."""
    model = build(name)
    model.total_steps.fill_(4)
    pairs = [(student, teacher, copy.deepcopy(teacher)) for student, teacher in model.teachers()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for seed in range(2):
        (model(**batch(name, seed=seed)).loss / 2).backward()
        for _, teacher, before in pairs:
            assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before.parameters(), strict=True))
    optimizer.step()
    model.after_optimizer_step()
    assert model.step == 1
    for student, teacher, before in pairs:
        m = model.teacher_momentum(0.0)
        for now, old, followed in zip(teacher.parameters(), before.parameters(), student.parameters(), strict=True):
            torch.testing.assert_close(now, m * old + (1 - m) * followed, rtol=1e-6, atol=1e-7)


@every_method
def test_warm_start_from_a_native_repo(name: str, tmp_path) -> None:
    config = make_config(name)
    torch.manual_seed(7)
    native = AutoModel.from_config(config.backbone_config)  # with the pooler that published checkpoints carry
    native.save_pretrained(tmp_path)
    model, report = load(name).from_pretrained(tmp_path, config=config, output_loading_info=True)
    new = "backbone.classifier." if TINY[name].classes else "no new head"
    assert not [key for key in report["missing_keys"] if key.startswith("backbone.") and not key.startswith(new)]
    wanted = native.state_dict()
    filled = model.backbone.base_model if TINY[name].classes else model.backbone
    for key, value in filled.state_dict().items():
        assert torch.equal(value, wanted[key]), key
    for student, teacher in model.teachers():
        for key, value in teacher.state_dict().items():
            assert torch.equal(value, student.state_dict()[key]), f"the teacher was not synced: {key}"
    images = torch.randn(2, 3, 16, 16)
    native.eval()
    two_towers = hasattr(native, "get_image_features")
    wanted = native.get_image_features(images).pooler_output if two_towers else native(images).last_hidden_state[:, 0]
    assert torch.equal(model.features(images), wanted)
    assert model.train()(**batch(name)).loss.isfinite()


@every_method
def test_config_round_trip(name: str, tmp_path) -> None:
    config = build(name).config
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(config) and type(again.backbone_config) is type(config.backbone_config)
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()


@every_method
def test_config_rejects_wrong_types_and_names_the_field(name: str) -> None:
    config = load(name).config_class
    field = next(
        f.name
        for f in dataclasses.fields(config)
        if f.name in config.__annotations__ and f.type in (int, float, int | None, float | int)
    )
    with pytest.raises(StrictDataclassError, match=field):
        config(**{field: "many"})


@every_method
def test_auto_classes_know_it(name: str, tmp_path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "ssl")
    processor(name).save_pretrained(tmp_path / "ssl")
    assert type(AutoModelForPreTraining.from_pretrained(tmp_path, subfolder="ssl")) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path, subfolder="ssl")) is type(model.config)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, subfolder="ssl")
    assert loaded.to_dict() == processor(name).to_dict()


@pytest.mark.parametrize("name", [name for name, tiny in sorted(TINY.items()) if tiny.takes_resnet])
def test_convolutional_backbones_train(name: str) -> None:
    model = build(name, RESNET)
    loss = train_step(model, adamw(model), batch(name))
    assert loss.isfinite() and model.features(torch.randn(2, 3, 16, 16)).shape == (2, 12)


@pytest.mark.parametrize("name", [name for name, tiny in sorted(TINY.items()) if not tiny.takes_resnet])
def test_unsuited_backbones_are_refused_in_words(name: str) -> None:
    with pytest.raises(ValueError, match="ResNetModel cannot"):
        build(name, RESNET)


@every_method
def test_gradient_checkpointing_changes_no_number(name: str) -> None:
    losses = []
    for checkpointing in (False, True):
        model = build(name)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**batch(name)).loss
        loss.backward()
        losses.append((loss.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-7)


@every_method
def test_bf16_autocast_stays_close(name: str) -> None:
    # a correlation over 8 rows moves by 10 % in some drawings of the weights; a memory of examples holds 8
    model, views = build(name), batch(name, 8 if load(name).needs_index else 16)
    exact = model(**views).loss.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = build(name)(**views).loss.detach()
    scale = max(abs(float(exact)), 0.5)  # a cosine may lie next to 0
    assert rough.dtype == torch.float32 and abs(float(rough - exact)) < 0.05 * scale


class HostReads(TorchDispatchMode):
    """Notes where our code asks for a value or a data-dependent size: on a GPU the host would wait for the device."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "bincount", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or any(asking in name for asking in self.ASKING):
            outer = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            ours = "hf_ssl" in outer[-1].filename or "tests" in outer[-1].filename
            if ours and "one_hot" not in str(outer[-1].line):  # which looks at its input on the CPU alone
                self.found.append(f"{outer[-1].filename}:{outer[-1].lineno} {name}")
        return function(*args, **(kwargs or {}))


@every_method
@pytest.mark.parametrize("backbone", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_step_never_waits_for_the_device(name: str, backbone: dict) -> None:
    if backbone is RESNET and not TINY[name].takes_resnet:
        return
    model, views = build(name, backbone), batch(name)
    with HostReads() as reads:
        loss = model(**views).loss
        loss.backward()
        clip_per_tensor(model.parameters(), 3.0)
        model.before_optimizer_step(0.5)
        model.after_optimizer_step(0.5)
    assert not reads.found
    with reads:
        float(loss.detach())
        loss.detach().view(1)[torch.ones(1, dtype=torch.bool)]
    assert len(reads.found) == 2
