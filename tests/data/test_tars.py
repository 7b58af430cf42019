"""Archives are read to their end mark: what is missing is an error, a sample without an image a row without one."""

import gzip
import io
import itertools
import tarfile

import numpy as np
import pytest

from hf_ssl.data import BadImageError, SourceError, load_source
from hf_ssl.data.stream import RowStream


def archive(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def one_pass(spec, streaming, **options):
    """The source, and each row's red value or "broken", of one pass as training reads it."""
    source = load_source(str(spec), streaming=streaming)
    rows = itertools.takewhile(lambda row: row["_epoch"] == 0, RowStream(source, 1, shuffle=False, **options))
    found = []
    for row in rows:
        try:
            found.append(int(source.decode(row)[0, 0, 0]))
        except BadImageError:
            found.append("broken")
    return source, found


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("end", [0.7, 34 * 1024, 34 * 1024 + 100, 34 * 1024 + 520, 0])
def test_an_archive_that_was_cut_is_an_error(make, tmp_path, end, streaming):
    """24 samples of two members of 1 kB; cut anywhere, between two members, in a header, in the data, to nothing."""
    path = tmp_path / "a.tar"
    make.write_tar(path, range(24))
    data = path.read_bytes()
    path.write_bytes(data[: int(end * len(data)) if isinstance(end, float) else end])
    with pytest.raises(SourceError, match=r"a.tar is not a whole .tar file: after its first \d+ member.* copy it"):
        one_pass(path, streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_compressed_archive_is_read_and_one_that_was_cut_is_an_error(make, tmp_path, streaming):
    make.write_tar(tmp_path / "plain", range(24))
    data = gzip.compress((tmp_path / "plain").read_bytes())
    for name in ("a.tar", "b.tar.gz", "c.TGZ"):
        (tmp_path / name).write_bytes(data)
        assert one_pass(tmp_path / name, streaming)[1] == list(range(24))
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(SourceError, match=f"{name} is not a whole .tar file"):
            one_pass(tmp_path / name, streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_archives_that_were_joined_or_damaged_are_an_error(make, tmp_path, streaming):
    make.write_tar(tmp_path / "a.tar", range(4))
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole + whole)
    with pytest.raises(SourceError, match="the end mark comes before the end of the file"):
        one_pass(tmp_path / "a.tar", streaming)
    (tmp_path / "a.tar").write_bytes(whole[:2048] + b"\xff" * 512 + whole[2560:])
    with pytest.raises(SourceError, match="there is no header where another member or the end mark should stand"):
        one_pass(tmp_path / "a.tar", streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("bad", [2, 12])
def test_a_sample_without_an_image_is_a_broken_row(make, tmp_path, bad, streaming):
    members = [(f"{i:03}.cls", b"1") for i in range(20)] + [
        (f"{i:03}.png", make.png(i)) for i in range(20) if i != bad
    ]
    source, found = one_pass(archive(tmp_path / "a.tar", sorted(members)), streaming)
    assert found == [*range(bad), "broken", *range(bad + 1, 20)]
    assert source.labels == ("cls",)


@pytest.mark.parametrize("streaming", [False, True])
def test_images_of_several_kinds_are_one_column_however_they_are_spelt(make, tmp_path, streaming):
    kinds = ["png", "PNG", "jpg", "JPG", "webp"]  # each file is a PNG: content decides
    members = [(f"{i:03}.{kinds[i % 5]}", make.png(i)) for i in range(20)]
    archive(tmp_path / "a.tar", [*members[:12], ("README", b"no extension"), (".hidden.png", b""), ("__x.png", b"")])
    archive(tmp_path / "b.tar", [])
    archive(tmp_path / "c.tar", members[12:])
    source, found = one_pass(tmp_path / "*.tar", streaming)
    assert found == list(range(20))
    row = next(iter(RowStream(source, 1, shuffle=False)))
    assert row["image"]["path"] == "000.png"
    pairs = [(f"{i}.{kind}", make.png(i)) for i in range(4) for kind in ("jpg", "png")]
    source = load_source(str(archive(tmp_path / "two" / "d.tar", pairs)), streaming=streaming)
    assert set(source.dataset.column_names) == {"image", "png", "__key__", "__url__"}  # two in a sample stay two


@pytest.mark.parametrize("streaming", [False, True])
def test_a_member_twice_or_of_nonsense_names_the_archive(make, tmp_path, streaming):
    images = [(f"{i:03}.png", make.png(i)) for i in range(9)]
    twice = archive(tmp_path / "a.tar", [*images, images[-1]])
    with pytest.raises(SourceError, match=r"a.tar holds 008.png twice in a row"):
        one_pass(twice, streaming)
    nonsense = archive(tmp_path / "b.tar", [*images, ("009.cls", b"dog")])
    with pytest.raises(SourceError, match=r"b.tar: the member 009.cls cannot be read: ValueError"):
        one_pass(nonsense, streaming)
    with pytest.raises(SourceError, match=r"there is no sample in them"):
        one_pass(archive(tmp_path / "empty" / "c.tar", []), streaming)


def test_arrays_and_records_beside_the_image(make, tmp_path):
    array = io.BytesIO()
    np.save(array, np.arange(6).reshape(2, 3))
    members = [("a.npy", array.getvalue()), ("a.json", b'{"x": 1}'), ("a.txt", b"words"), ("a.png", make.png(3))]
    for streaming in (False, True):
        source, found = one_pass(archive(tmp_path / "a.tar", members), streaming)
        row = next(iter(RowStream(source, 1)))
        assert found == [3] and row["npy"] == [[0, 1, 2], [3, 4, 5]] and row["json"] == {"x": 1}
        assert source.captions(row) == ["words"]


@pytest.mark.parametrize("workers", [1, 2])
def test_ranks_and_workers_notice_as_well(make, tmp_path, workers):
    """The archive that was cut is read by one of four readers; it raises, and the others go on with theirs."""
    for i in range(4):
        make.write_tar(tmp_path / f"{i}.tar", range(i * 8, i * 8 + 8))
        packed = gzip.compress((tmp_path / f"{i}.tar").read_bytes())
        (tmp_path / f"{i}.tar").write_bytes(packed if i < 3 else packed[: len(packed) // 2])
    caught = []
    for rank in range(4 // workers):
        for worker in range(workers):
            stream = RowStream(load_source(str(tmp_path), streaming=True), 1, rank, 4 // workers, shuffle=False)
            try:
                list(itertools.islice(stream._streamed_rows(worker, workers), 12))
            except SourceError as error:
                caught.append(str(error))
    assert len(caught) == 1 and "3.tar is not a whole .tar file" in caught[0]
