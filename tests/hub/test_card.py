"""Cards without a Hub: figures as model-index, what users wrote, citations, folders that are not what was trained."""

import pytest
import torch
from huggingface_hub import ModelCard

from hf_ssl.hub import export, load_method
from hf_ssl.hub.card import citation, merged, model_card
from hf_ssl.hub.folder import ParityError, check_parity, files
from hf_ssl.hub.results import eval_results
from hf_ssl.methods import METHODS, load
from tests.contract.tiny import VIT, build, processor

ROWS = [
    {"protocol": "placed", "model": "raw pixels", "knn20_group": 0.3, "r1": 0.1},
    {"protocol": "placed", "model": "untrained", "knn20_group": 0.2, "r1": 0.1, "rankme": 3.0},
    {"protocol": "placed", "model": "trained", "knn20_group": 0.5, "r1": 0.4, "rankme": 9.0, "confusion": [[1]]},
    {"protocol": "centred", "model": "EMA weights", "accuracy": 0.9, "macro_f1": 0.8, "ece": 0.1},
]
RUN = {
    "dataset": "emoji:placed", "results": ROWS, "license": "mit",
    "evaluated_on": {"placed": {"dataset": "emoji:placed", "split": "test"}},
    "init": {"from_pretrained": "owner/base"}, "licences": {"base_model": "mit (owner/base)"},
}  # fmt: skip


def test_figures_carry_dataset_split_and_baselines() -> None:
    found = {(r.dataset_name, r.metric_name): r for r in eval_results(RUN)}
    knn = found["emoji:placed (placed)", "kNN-20 group"]
    assert (knn.task_type, knn.metric_type, knn.metric_value) == ("image-classification", "accuracy", 0.5)
    assert knn.dataset_split == "test" and knn.metric_args == {"baselines": {"raw pixels": 0.3, "untrained": 0.2}}
    assert found["emoji:placed (placed)", "R@1"].metric_type == "recall"
    assert {name for _, name in found} == {"kNN-20 group", "R@1", "accuracy", "macro F1"}  # health is no score


@pytest.mark.parametrize("channels", [1, 3])
def test_a_classifiers_snippet_runs_on_its_own_channels(channels: int, tmp_path, capsys) -> None:
    """Pipelines make every picture RGB, which a model of grey pictures refuses."""
    model = build("fixmatch", {**VIT, "num_channels": channels})
    export(model, processor("fixmatch", num_channels=channels), tmp_path)
    text = str(model_card(model, RUN, str(tmp_path)))
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert any(name in capsys.readouterr().out for name in model.export_backbone.config.id2label.values())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_a_card_and_a_citation(name: str) -> None:
    model = build(name)
    text = str(model_card(model, RUN, "alice/x"))
    data = ModelCard(text).data
    assert data.base_model == "owner/base" and data.license == "mit" and data.model_name == "x"
    assert 'model="alice/x"' in text or '"alice/x"' in text
    for words in ("## Limits", "## Licences", "mit (owner/base)", "Google's drawings Apache-2.0", "kNN-20 group"):
        assert words in text, words
    entry = citation(load(name).paper)
    assert entry.startswith(f"@misc{{{load(name).paper.bibtex},") and load(name).paper.authors
    assert entry.count("{") == entry.count("}") and f"eprint = {{{load(name).paper.arxiv}}}" in entry


def test_a_foreign_card_becomes_the_users_part() -> None:
    card = ModelCard("---\ntags:\n- a\n---\n\n<!-- hf_ssl:begin: x -->\nnew\n<!-- hf_ssl:end -->\n")
    theirs = "---\nlicense: mit\ntags:\n- b\nlanguage: fr\n---\n\n# My model\n\nText.\n"
    once = str(merged(card, theirs))
    assert once.index("new") < once.index("# My model")
    data = ModelCard(once).data
    assert (data.license, data.language, data.tags) == ("mit", "fr", ["a", "b"])
    assert str(merged(ModelCard(str(card)), once, theirs)).count("# My model") == 1
    broken = "---\nlicense: [\n---\n\n# Still mine\n"
    assert "# Still mine" in str(merged(ModelCard(str(card)), broken))


def test_a_root_that_is_not_the_trained_model_is_refused(tmp_path) -> None:
    model, views = build("simclr"), processor("simclr")
    export(model, views, tmp_path)
    assert check_parity(tmp_path, model, views) == 0.0 and model.training
    (tmp_path / "run.json").write_text("{}")
    assert "run.json" not in files(tmp_path) and "ssl/model.safetensors" in files(tmp_path)
    assert load_method(tmp_path)[0].processor is not None
    with torch.no_grad():
        next(model.backbone.parameters()).mul_(1.01)
    with pytest.raises(ParityError, match="features differ"):
        check_parity(tmp_path, model, views)
    with pytest.raises(ParityError, match="image processor makes other pictures"):
        check_parity(tmp_path, model, processor("simclr", image_mean=[0.1, 0.1, 0.1]))
