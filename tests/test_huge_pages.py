"""Huge pages: where they come from, on which file system, and what stats() says where there are none."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from programs import private_mount, run_program

import memodb
from memodb.testing import assert_same_bytes, random_records

HUGE = (2, 512, 1024)  # uint16: 2 MiB
MIB = 1 << 20
POOL = Path("/proc/sys/vm/nr_hugepages")


def told(db):
    """Return what a store says of its pages."""
    stats = db.stats()
    return stats["filesystem"], stats["huge_page_share"], stats["huge_page_note"]


def test_stats_of_tmpfs(make, path):
    db = make(shape=HUGE, dtype="uint16")
    assert told(db)[1:] == (0.0, ""), "an empty store lacks nothing"
    ids = db.put(random_records(4, HUGE, "uint16"))
    kind, share, note = told(db)
    assert db.stats()["values_path"] == str(path / "values")
    assert 0 <= share <= 1
    assert (share == 1) == (note == "")
    if kind == "tmpfs" and share == 1:
        with db.multiget_mapped(ids) as batch:
            assert batch.zero_copy
    with memodb.MemoDB.open(path) as reader:
        assert told(reader) == (kind, share, note)


def test_info_tells_file_system_share_and_reason(make, path, capsys):
    from memodb.cli import main

    make(shape=(1024,)).put(np.ones((3, 1024), np.float32))
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    kind = memodb.MemoDB.open(path).stats()["filesystem"]
    for name, value in (("filesystem", kind), ("values_path", str(path / "values")), ("huge_page_share", "")):
        assert any(line.split()[:1] == [name] and value in line for line in out.splitlines())
    assert "huge_page_note" in out


def test_stats_say_that_nobody_asked_for_huge_pages(make):
    db = make(shape=HUGE, dtype="uint16", huge_pages=False)
    db.put(random_records(4, HUGE, "uint16"))
    kind, share, note = told(db)
    if kind != "tmpfs" or share == 1:
        pytest.skip(f"{kind} with huge pages of its own: share {share}")
    assert "huge_pages=False" in note or "Linux 6.7" in note


def test_stats_of_less_than_a_huge_page(disk):
    with memodb.MemoDB.create(disk / "store", shape=(1024,), dtype="float32") as db:
        db.put(np.ones((10, 1024), np.float32))
        assert "fill" in told(db)[2]


@pytest.mark.parametrize(("gives", "knows", "expected"), [(3, True, "fragmented"), (0, False, "Linux 6.1")])
def test_stats_of_tmpfs_that_gave_fewer_huge_pages(make, monkeypatch, gives, knows, expected):
    """What fragmented memory and old kernels do, played: the first so many ranges become huge pages, others do not."""
    left = [gives]

    def collapse(address, nbytes):
        left[0] -= nbytes <= 2 * MIB
        return nbytes <= 2 * MIB and left[0] >= 0

    monkeypatch.setattr("memodb.vm.collapse", collapse)
    monkeypatch.setattr("memodb.vm.can_collapse", lambda: knows)
    values = random_records(6, HUGE, "uint16")
    db = make(shape=HUGE, dtype="uint16")
    ids = db.put(values)
    kind, share, note = told(db)
    if kind != "tmpfs":
        pytest.skip(f"no tmpfs here but {kind}")
    assert share == gives / 6
    assert expected in note or "deny" in note
    assert_same_bytes(db.multiget_mapped(ids).numpy(), values)


def large_folios(db):
    """Skip where the page cache of this disk has no pages of 2 MiB, or the kernel does not tell."""
    kind, share, note = told(db)
    if share != 1:
        assert kind
        assert note
        pytest.skip(f"no page cache of huge pages on {kind}: {note}")


def test_large_puts_are_mapped_from_the_page_cache(disk):
    values = random_records(16, HUGE, "uint16")
    with memodb.MemoDB.create(disk / "store", shape=HUGE, dtype="uint16") as db:
        ids = db.put(values)
        with db.multiget_mapped(ids[::-1]) as batch:  # before stats(): the gather looks by itself
            mapped = batch.zero_copy
            assert_same_bytes(batch.numpy(), values[::-1])
            batch.numpy(writable=True)[:] = 0
        large_folios(db)
        assert mapped
        assert_same_bytes(db.multiget(ids), values)


def test_small_puts_are_said_to_lie_on_small_pages(disk):
    values = random_records(64, (64, 1024), "uint16")
    with memodb.MemoDB.create(disk / "large", shape=HUGE, dtype="uint16") as db:
        db.put(random_records(8, HUGE, "uint16"))
        large_folios(db)
    with memodb.MemoDB.create(disk / "store", shape=(64, 1024), dtype="uint16") as db:
        for value in values:
            db.put(value[None])
        _, share, note = told(db)
        assert share < 1
        assert "at once" in note


def bytes_read():
    """Return how many bytes this process had read from disks."""
    with open("/proc/self/io") as lines:
        return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def test_looking_reads_nothing_from_a_disk(disk):
    values = random_records(32, HUGE, "uint16")
    with memodb.MemoDB.create(disk / "store", shape=HUGE, dtype="uint16") as db:
        ids = db.put(values)
        large_folios(db)
    segment = disk / "store" / "values" / "00000001.seg"
    fd = os.open(segment, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    with memodb.MemoDB.open(disk / "store") as db:
        before = bytes_read()
        _, share, note = told(db)
        if bytes_read() == before and share == 0:
            assert "page cache" in note
        else:
            assert share == 1, "the file stayed in memory: it is looked at"
            assert bytes_read() == before
        assert_same_bytes(db.multiget(ids), values)
        with db.multiget_mapped(ids) as batch:
            assert_same_bytes(batch.numpy(), values)


# --- segments elsewhere ---


@pytest.fixture
def elsewhere(disk):
    (disk / "segments").mkdir()
    return disk / "segments"


def test_segments_lie_where_they_were_sent(make, path, elsewhere):
    values = random_records(20, (2, 1024), "float32")
    db = make(segments_path=str(elsewhere), segment_bytes=8 * 8192)
    assert list(elsewhere.iterdir()) == [], "a store without records leaves nothing there"
    ids = db.put(values)
    (own,) = elsewhere.iterdir()
    assert db.stats()["values_path"] == str(own)
    assert len(list(own.iterdir())) == 3
    assert not list((path / "values").iterdir())
    for strategy in ("auto", "map", "copy"):
        with db.multiget_mapped(ids[::-1], strategy=strategy) as batch:
            assert_same_bytes(batch.numpy(), values[::-1])
    db.delete(ids[:8])
    assert db.compact() > 0
    assert len(list(own.iterdir())) == 2
    db.close()
    with memodb.MemoDB.open(path, mode="r+") as db:
        db.put(values)
        assert db.verify() == []


def test_two_stores_do_not_mix(make, shm, elsewhere):
    values = random_records(2, (2, 1024), "float32")
    first = make(shm / "one", segments_path=str(elsewhere))
    second = make(shm / "two", segments_path=str(elsewhere))
    first.put(values[:1])
    second.put(values[1:])
    first.close()
    second.close()
    for name, expected in (("one", values[:1]), ("two", values[1:])):
        with memodb.MemoDB.open(shm / name, mode="r+") as db:
            assert_same_bytes(db.multiget([0]), expected)
    assert len(list(elsewhere.iterdir())) == 2


def test_a_moved_store_keeps_its_segments(make, shm, elsewhere, monkeypatch):
    values = random_records(2, (2, 1024), "float32")
    monkeypatch.chdir(elsewhere.parent)
    with make(shm / "one", segments_path="segments") as db:
        db.put(values)
    monkeypatch.chdir("/")
    os.rename(shm / "one", shm / "two")
    for mode in ("r", "r+"):
        with memodb.MemoDB.open(shm / "two", mode=mode) as db:
            assert_same_bytes(db.multiget([0, 1]), values)


@pytest.mark.parametrize("gone", ["directory", "file system"])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_missing_segments_are_named_at_open(make, path, elsewhere, gone, mode):
    with make(segments_path=str(elsewhere)) as db:
        db.put(random_records(2, (2, 1024), "float32"))
    (own,) = elsewhere.iterdir()
    shutil.rmtree(own if gone == "directory" else elsewhere)
    with pytest.raises(memodb.StoreNotFoundError, match=str(own)):
        memodb.MemoDB.open(path, mode=mode)
    with pytest.raises(FileNotFoundError):
        memodb.MemoDB.open(path, mode=mode)


def test_what_cannot_be_a_segments_path(make, path, elsewhere):
    (elsewhere / "file").touch()
    for bad in (str(elsewhere / "nowhere"), str(elsewhere / "file"), "", 1, True, [str(elsewhere)], b"/tmp"):
        with pytest.raises(memodb.InvalidOptionError, match=r"segments_path.*existing directory"):
            make(segments_path=bad)
    assert not path.exists()


def test_copy_into_another_place_and_a_copy_that_fails(make, path, shm, elsewhere):
    values = random_records(20, (2, 1024), "float32")
    with make() as db:
        db.put(values)
    memodb.copy(path, shm / "copy", segments_path=str(elsewhere))
    with memodb.MemoDB.open(shm / "copy") as db:
        assert_same_bytes(db.multiget(range(20)), values)
    assert len(list(elsewhere.iterdir())) == 1
    with open(path / "values" / "00000001.seg", "r+b") as segment:
        segment.write(b"\xff\x00\xff\x00")
    with pytest.raises(memodb.CorruptionError):
        memodb.copy(path, shm / "bad", segments_path=str(elsewhere))
    assert not (shm / "bad").exists()
    assert len(list(elsewhere.iterdir())) == 1, "the unfinished copy left nothing"


# --- file systems that only root can mount ---

ON_A_MOUNT = """
import json, os, sys, numpy as np, memodb
from memodb.testing import assert_same_bytes, random_records

at = sys.argv[1]
values = random_records(8, (2, 512, 1024), "uint16")
for huge in (True, False):
    with memodb.MemoDB.create(f"{at}/store-{huge}", shape=(2, 512, 1024), dtype="uint16", huge_pages=huge) as db:
        ids = db.put(values)
        with db.multiget_mapped(ids[::-2]) as batch:
            assert_same_bytes(batch.numpy(), values[::-2])
            mapped = batch.zero_copy
        stats = db.stats()
        print(json.dumps([stats["filesystem"], stats["huge_page_share"], stats["huge_page_note"], mapped]))
"""


@pytest.mark.parametrize("huge", ["always", "within_size", "advise", "never"])
def test_a_tmpfs_mounted_with_huge(disk, huge):
    """The recipe works on every tmpfs; one with huge=always gives huge pages to a store that did not ask as well."""
    import json

    wrapper = private_mount(disk / "mount", "tmpfs", f"size=128m,huge={huge}")
    asked, not_asked = map(json.loads, run_program(disk, ON_A_MOUNT, disk / "mount", wrapper=wrapper).splitlines())
    assert asked[0] == not_asked[0] == "tmpfs"
    assert asked[1] == 1 or asked[2], "huge, or a reason why not"
    assert not_asked[1] == 1 or not_asked[2]
    if asked[1] == 1:
        assert asked[3], "what is huge is mapped"
    if huge == "always" and asked[1] == 1 and "Linux 6.7" not in not_asked[2]:
        assert not_asked[1] == 1


@pytest.fixture
def pool():
    """Put 20 pages of 2 MiB into the pool of hugetlbfs while a test runs."""
    if os.geteuid() != 0:
        pytest.skip("hugetlbfs can be mounted by root only")
    try:
        if "Hugepagesize:       2048 kB" not in Path("/proc/meminfo").read_text():
            pytest.skip("huge pages of another size than 2 MiB")
        before = POOL.read_text()
        POOL.write_text(str(int(before) + 20))
    except OSError as error:
        pytest.skip(f"the pool of huge pages cannot be filled: {error}")
    try:
        if int(POOL.read_text()) < int(before) + 20:
            pytest.skip("not enough free memory for 20 huge pages")
        yield
    finally:
        POOL.write_text(before)


ON_HUGETLBFS = """
import os, sys, numpy as np, pytest, memodb
from memodb.testing import assert_same_bytes, random_records

at, path = sys.argv[1], sys.argv[2] + "/store"
values = random_records(24, (512, 1024), "uint16")  # 1 MiB each
more = random_records(40, (512, 1024), "uint16", 1)
options = {"shape": (512, 1024), "dtype": "uint16", "segment_bytes": 8 << 20, "segments_path": at}
with memodb.MemoDB.create(path, **options) as db:
    ids = np.concatenate([db.put(values[i : i + 3]) for i in range(0, 24, 3)])
    stats = db.stats()
    assert (stats["filesystem"], stats["huge_page_share"]) == ("hugetlbfs", 1.0), stats
    assert "copied" in stats["huge_page_note"]
    for strategy in ("auto", "copy"):
        with db.multiget_mapped(ids[::-1], strategy=strategy) as batch:
            assert not batch.zero_copy
            assert_same_bytes(batch.numpy(), values[::-1])
            batch.numpy(writable=True)[:] = 0  # never the store's own pages
    with pytest.raises(memodb.MappingUnsupportedError, match="hugetlbfs"):
        db.multiget_mapped(ids, strategy="map")
    for _ in range(3):  # the pool is too small: no signal, nothing stored, nothing lost
        with pytest.raises(memodb.StoreFullError, match="nr_hugepages"):
            db.put(more)
    assert db.ids().tolist() == ids.tolist()
    ids = np.concatenate([ids, db.put(values[:8])])
    assert_same_bytes(db.multiget(ids), np.concatenate([values, values[:8]]))
    db.delete(ids[:8])
    assert db.compact() == 8 << 20
    if os.fork() == 0:
        assert_same_bytes(db.multiget(ids[8:24]), values[8:])
        os._exit(0)
    assert os.wait()[1] == 0
    assert db.verify() == []
with memodb.MemoDB.open(path, mode="r+") as db:
    assert_same_bytes(db.multiget(ids[8:24]), values[8:])
    db.put(values[:2])
    assert db.verify() == []
print("ok")
"""


def test_segments_on_hugetlbfs(disk, pool):
    wrapper = private_mount(disk / "huge", "hugetlbfs", "pagesize=2M")
    assert run_program(disk, ON_HUGETLBFS, disk / "huge", disk, wrapper=wrapper) == "ok\n"
