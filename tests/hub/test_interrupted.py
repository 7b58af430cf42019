"""Publishing while training: kill -9 in the middle of an upload, resume, publish; every commit is whole."""


def test_every_commit_loads(scenario) -> None:
    found = scenario("killed")
    assert found["killed"] == -9 and found["resumed"] == 0, found["said"]
    step = "Training in progress, step {}".format
    assert found["after the kill"] == [step(2), "initial commit"], "half an upload is visible"
    assert found["in the end"][0] == "End of training"
    assert found["in the end"][-2:] == [step(2), "initial commit"]
    assert found["steps"][0] == 8 and found["steps"] == sorted(found["steps"], reverse=True)
    assert found["steps"][-1] == 2


def test_what_a_killed_upload_left_is_cleared(scenario) -> None:
    found = scenario("killed")
    assert found["left"] >= 1 and found["left in the end"] == 0


def test_another_machine_goes_on_from_the_repo(scenario) -> None:
    """hub_strategy checkpoint: the same commit holds last-checkpoint/, with the optimizer and without paths."""
    found = scenario("killed")
    assert found["again"] == 10
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= set(found["files"])
    assert not [path for path in found["files"] if path.startswith("ssl/") and path.endswith(".pt")]


def test_an_earlier_checkpoint_can_be_published(scenario) -> None:
    found = scenario("killed")
    assert found["published"] == 0 and found["step published"] == 6
