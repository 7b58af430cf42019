"""Training data over HTTP from a server that fails one request in five, and from one that loses a file."""

import pyarrow as pa
import pytest

from hf_ssl.data import remote


@pytest.mark.parametrize("repo", ["alice/shards", "alice/loose"])
def test_the_rows_are_those_of_the_run_without_faults(scenario, repo: str) -> None:
    """500 batches from parquet, and single files of a folder; several passes, each row many times."""
    found = scenario("stream")[repo]
    assert found["same"] and found["faults"] >= 10
    assert found["rows"] == (2000 if repo == "alice/shards" else 80)
    assert found["epochs"] > 3 and found["distinct"] == (256 if repo == "alice/shards" else 24)


def test_a_lost_file_ends_in_a_sentence_and_a_checkpoint(scenario) -> None:
    lost = scenario("stream")["lost"]
    assert lost["code"] == 1 and len(lost["checkpoints"]) == 1, lost
    assert "is gone" in lost["said"] and "404" in lost["said"] and "Traceback" not in lost["said"]


def test_a_server_that_stays_busy_is_told_from_a_lost_file(scenario) -> None:
    assert "could not be read for" in scenario("stream")["busy for long"]


def test_a_broken_shard_goes_on_at_its_row_however_the_tables_are_cut(monkeypatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    sizes = iter([[4, 4, 4], [6, 6], [5, 7]])
    breaks = iter([6, 8, None])

    def tables():
        start, stop = 0, next(breaks)
        for size in next(sizes):
            if stop is not None and start + size > stop:
                raise ConnectionResetError("cut")
            yield pa.table({"row": list(range(start, start + size))})
            start += size

    rows = [row for table in remote.resumed(tables, "shard 0") for row in table["row"].to_pylist()]
    assert rows == list(range(12)) and waited == [1.0, 1.0]


def test_what_no_waiting_mends_is_raised_at_once(monkeypatch) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: pytest.fail("it waited"))
    with pytest.raises(ZeroDivisionError):
        remote.steadily(lambda: 1 // 0, "a file")
    with pytest.raises(remote.RemoteError, match=r"a file is gone: FileNotFoundError: there is none\. "):
        remote.steadily(lambda: (_ for _ in ()).throw(FileNotFoundError("there is none")), "a file")


def test_waiting_ends(monkeypatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    with pytest.raises(remote.RemoteError, match="could not be read for 183 seconds and 9 tries"):
        remote.steadily(lambda: (_ for _ in ()).throw(TimeoutError()), "a file")
    assert waited == list(remote.WAITS)
