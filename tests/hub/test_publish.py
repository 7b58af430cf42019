"""Train, publish, load elsewhere: real HTTP, the real client, processes that have no hf_ssl."""

import numpy as np
import pytest

ROOT_FILES = {"README.md", "config.json", "model.safetensors"}
SSL_FILES = {"ssl/config.json", "ssl/model.safetensors", "ssl/preprocessor_config.json"}


@pytest.mark.parametrize("name", ["simclr", "clip", "fixmatch"])
def test_plain_transformers_opens_what_was_pushed(scenario, name: str) -> None:
    """By trainer.push_to_hub, model.push_to_hub (private) and ``hf-ssl publish`` of a checkpoint: one layout."""
    found = scenario("publish")
    plain = found["plain"][f"alice/{name}"]
    np.testing.assert_allclose(plain["features"], found[name]["features"], rtol=0, atol=1e-5)
    assert np.std(found[name]["features"], axis=0).max() > 0
    assert set(found["files"][name]) >= ROOT_FILES | SSL_FILES
    assert not [path for path in found["files"][name] if path.endswith((".bin", ".pt", ".pth"))], "optimizer or pickle"
    for kind in ("zero_shot", "labels"):
        pairs = zip(plain.get(kind, []), found[name].get(kind, [])) if kind == "zero_shot" else [(plain, found[name])]
        for there, here in pairs if kind in plain else []:
            there, here = (there, here) if kind == "zero_shot" else (there[kind], here[kind])
            assert there == pytest.approx(here, abs=1e-5)
    assert plain.get("same", True)


def test_the_method_is_found_in_the_same_repo(scenario) -> None:
    assert scenario("publish")["step"] == 20


def test_nothing_names_this_machine(scenario) -> None:
    for name in ("publish", "card"):
        assert scenario(name)["leaks"] == []


def test_the_card_is_valid_complete_and_runs(scenario) -> None:
    found = scenario("card")
    card, data = found["card"], found["data"]
    assert found["snippet"] == "torch.Size([1, 128])\n"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-feature-extraction"
    assert {"hf_ssl", "simclr", "joint-embedding", "self-supervised"} <= set(data["tags"])
    knn = next(result for result in found["results"] if result["metric_name"] == "kNN-20")
    assert (knn["dataset_name"], knn["dataset_split"]) == ("photos", "test")
    assert set(knn["metric_args"]["baselines"]) == {"raw pixels", "untrained"}
    for words in (
        "hf-ssl train simclr --dataset photos", "32 in 4 steps of 8", "CPU cores, no GPU", "Wall time",
        "random weights", "pictures/neighbours.png", "## Limits", "## Licences", "@misc{chen2020simclr",
        "Chen, Ting", "24 images",
    ):  # fmt: skip
        assert words in card, words
    assert "pictures/neighbours.png" in found["files"]


def test_what_users_wrote_stays(scenario) -> None:
    found = scenario("card")
    for card in (found["card"], found["branch"]):
        assert card.count("Read me first.") == card.count("I wrote this.") == 1
        assert (
            card.index("Read me first.")
            < card.index("hf_ssl:begin")
            < card.index("hf_ssl:end")
            < card.index("## Mine")
        )
    assert found["data"]["language"] == "en" and "my-tag" in found["data"]["tags"]
    assert found["data"]["license"] == "cc-by-4.0"


def test_a_save_a_commit_and_no_commit_without_a_change(scenario) -> None:
    found = scenario("card")
    steps = ["Training in progress, step 4", "Training in progress, step 2", "initial commit"]
    assert found["train"] == 0 and found["commits"] == ["End of training", *steps]
    assert found["publish"] == [0, 0, 0] and found["history"].count("Publish with hf_ssl") == 1


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("wrong token", "does not know the token (401)"),
        ("read-only token", "may not write to alice/tiny (403)"),
        ("another's namespace", "may not write to bob/tiny (403)"),
        ("no repo id", "is no repo id: give user/name"),
        ("server error", "a problem of its own (500)"),
        ("conflict", "being changed by somebody else (409)"),
        ("reset", "the connection to the Hub broke"),
        ("not found", "is not there, or this token may not see it (404)"),
        ("too large", "too large (413)"),
        ("disk full", "the disk is full"),
    ],
)
def test_each_failure_has_its_sentence(scenario, case: str, words: str) -> None:
    sentence = scenario("refused")["sentences"][case]
    assert sentence.startswith("not published: ") and words in sentence
    assert case == "disk full" or "hf-ssl publish " in sentence  # how to repeat it, from the copy that was kept


def test_failures_leave_nothing_behind_and_can_be_repeated(scenario) -> None:
    found = scenario("refused")
    assert found["before"] == 1, "a refused push left a commit"
    assert found["kept"] == 9 and found["repeated"] == 0
    assert set(found["worked"]) == {"busy twice", "reset once", "somebody else meanwhile", "private"}
    assert "theirs.txt" in found["after"]["files"], "a commit in between was overwritten"
    assert found["after"]["titles"][:2] == ["Publish with hf_ssl", "by somebody else"]


def test_gated_and_private_repos_say_so(scenario) -> None:
    found = scenario("refused")
    assert "alice/tiny is gated: ask for access" in found["load"]["gated"]
    assert "no repo that this token may see" in found["load"]["private"]
    assert found["owner"] == 1
