"""Recipes: the same checks as a command line, the order of precedence, and the ones that ship."""

from pathlib import Path

import pytest

from hf_ssl.cli.console import UsageError
from hf_ssl.cli.plan import plan_training
from hf_ssl.cli.recipes import default_recipe
from hf_ssl.methods import METHODS

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*_*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_found(path):
    method = max((name for name in METHODS if path.stem.startswith(f"{name}_")), key=len)
    dataset = path.stem.removeprefix(f"{method}_")
    plan = plan_training([method, "--dataset", dataset])
    assert plan.recipe == path and "default" in plan.recipe_note
    assert "dataset" not in plan.group("data") or plan.group("data")["dataset"] == dataset
    header = path.read_text().split("\n\n")[0]
    assert all(word in header for word in ("command", "machine", "time", "expected"))


def test_a_variant_shares_the_recipe_and_a_folder_has_none(tmp_path, monkeypatch):
    assert default_recipe("simclr", "emoji:placed") == RECIPES / "simclr_emoji_placed.yaml"
    assert default_recipe("dino", "emoji:placed") == RECIPES / "dino_emoji.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()
    assert default_recipe("simclr", "emoji") is None
    assert "no recipe for ./emoji" in plan_training(["simclr", "--dataset", "./emoji"]).recipe_note


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("temprature: 0.1\n", "there is no flag 'temprature'; the nearest is temperature."),
        ("max_steps: ten\n", "max_steps must be a whole number, not 'ten'."),
        ("max_steps: 1.5\n", "max_steps must be a whole number, not 1.5."),
        ("bf16: 3\n", "bf16 must be true or false, not 3."),
        ("optim: lasr\n", "optim must be one of 44 names (the nearest is lars), not 'lasr'."),
        ("out_dim: 3\n", "'out_dim' is a flag of dino, "),
        ("seed: 1\nseed: 2\n", "'seed' is given twice (line 1 on)."),
        ("- seed\n", "it must be a mapping of flag: value, not a list."),
        ("seed: [\n", "it is not YAML at line 2"),
        ("learning_rate: 1\nbase_learning_rate: 1\n", "give learning_rate or base_learning_rate, not both."),
        ("hub_token: [secret]\n", "hub_token must be text, not ***."),
    ],
)
def test_a_bad_recipe_names_file_and_key(tmp_path, text, words):
    path = recipe(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        plan_training(["simclr", path])
    assert str(caught.value).startswith(f"recipe {path}: ") and words in str(caught.value)


def test_a_missing_recipe_names_the_nearest():
    with pytest.raises(
        UsageError, match=r"no recipe file recipes/simclr_emjoi.yaml; the nearest is .*simclr_emoji.yaml"
    ):
        plan_training(["simclr", "recipes/simclr_emjoi.yaml"])


def test_yaml_spellings(tmp_path):
    """PyYAML reads a bare `no` as false and 1e-3 as text."""
    path = recipe(tmp_path, "save_strategy: no\nlearning_rate: 1e-3\nscale: null\nreport_to: none\nhidden_dim: 64\n")
    values = plan_training(["simclr", path]).values
    assert values["save_strategy"] == "no" and values["learning_rate"] == 1e-3 and values["scale"] is None
    assert values["report_to"] == ["none"] and values["hidden_dim"] == 64


def test_precedence_paper_then_recipe_then_flags(tmp_path):
    path = recipe(tmp_path, "weight_decay: 0.5\nmax_steps: 9\nwarmup_steps: 0.2\nbase_learning_rate: 0.1\n")
    paper = {"optim": "lars", "weight_decay": 1e-4, "warmup_steps": 0.1, "base_learning_rate": 0.3}
    plan = plan_training(["simclr", path, "--warmup_steps", "3", "--learning_rate", "0.01", "--num_train_epochs", "2"])
    training = plan.training(paper)
    assert training["optim"] == "lars" and training["weight_decay"] == 0.5 and training["warmup_steps"] == 3
    # what a higher level says of the same thing takes back the lower one
    assert training["learning_rate"] == 0.01 and "base_learning_rate" not in training
    assert training["num_train_epochs"] == 2 and "max_steps" not in training


def test_group_dicts_merge(tmp_path):
    path = recipe(tmp_path, "local_pixel_values: {count: 4, size: 24}\n")
    plan = plan_training(["dino", path, "--local_pixel_values", '{"count": 2}'])
    assert plan.group("views") == {"local_pixel_values": {"count": 2, "size": 24}}
