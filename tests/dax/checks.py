"""Runs in the guest: ``checks.py writer|pages|inode|node LAYOUT MOUNT whole|any``; a check is a line of the table."""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import memodb
from memodb import vm
from memodb.testing import assert_same_bytes, random_records
from memodb.threads import CREW

MARK, MIB = "@@ ", 1 << 20
#: Three huge pages each.
SHAPE, NBYTES = (12, 512, 512), 6 * MIB
RECORDS, WANTED = 16, 12

PART, LAYOUT, MOUNT, WHOLE = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "whole"


@contextmanager
def check(name: str) -> Iterator[list[str]]:
    """Report what the block puts into its list; an exception is a failure."""
    seen: list[str] = []
    result = "ok"
    try:
        yield seen
    except Exception as error:
        import traceback

        traceback.print_exc()
        result = "FAILED"
        seen.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    gc.collect()
    print(MARK + json.dumps({"where": LAYOUT, "check": name, "result": result, "seen": "; ".join(seen)}), flush=True)


#: Those whose records are files that the file system maps, and the call that flushes each.
FLUSH = {"arena": "fdatasync", "files": "syncfs"}


def create(name: str, at: Path = MOUNT, **settings: object) -> memodb.MemoDB:
    return memodb.MemoDB.create(at / name, shape=SHAPE, dtype="float16", **settings)


def can_map_synchronously(folder: Path) -> bool:
    """Tell whether a new file in `folder` can be mapped with MAP_SYNC."""
    path = folder / "tried"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.posix_fallocate(fd, 0, 4096)
        return vm.can_map_synchronously(fd)
    finally:
        os.close(fd)
        path.unlink()


def flags_of(address: int) -> list[str]:
    """Return the VmFlags of the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, _, end = first.partition("-")
            inside = int(start, 16) <= address < int(end, 16)
        elif inside and first == "VmFlags:":
            return rest.split()
    return []


def writer() -> None:
    """What the writer does: maps with MAP_SYNC here, by pwrite elsewhere, and meets a full device with an error."""
    with check("MAP_SYNC: here, not on tmpfs, not on ext4 without DAX") as seen:
        tried = {"here": MOUNT, "tmpfs": Path("/dev/shm"), "ext4 without DAX": Path("/opt")}
        found = {name: can_map_synchronously(folder) for name, folder in tried.items()}
        seen.append(", ".join(f"{name}: {'mapped' if ok else 'refused'}" for name, ok in found.items()))
        assert found == {"here": True, "tmpfs": False, "ext4 without DAX": False}

    values = random_records(4, SHAPE, "float16")
    for backend in FLUSH:
        written(backend, values)

    with check("a full device is StoreFullError, no signal") as seen:
        filler = MOUNT / "filler"
        with create("full") as db:
            ids = db.put(values[:1])
            room = os.statvfs(MOUNT)
            fd = os.open(filler, os.O_RDWR | os.O_CREAT)
            try:
                os.posix_fallocate(fd, 0, room.f_bavail * room.f_frsize - 12 * MIB)
                db.put(values)
            except memodb.StoreFullError as error:
                seen.append(str(error).split(";")[0].replace(str(MOUNT), "."))
            finally:
                os.close(fd)
                filler.unlink()
            assert seen, "24 MiB were put where 12 are free"
            assert_same_bytes(db.multiget(np.concatenate([ids, db.put(values)])), values[[0, 0, 1, 2, 3]])
        shutil.rmtree(MOUNT / "full")

    with check("a disk without DAX: pwrite, as ever") as seen:
        with create("plain", Path("/opt")) as db:
            ids = db.put(values)
            assert_same_bytes(db.multiget(ids), values)
            seen.append(f"{db.stats()['filesystem']}: dax {db.stats()['dax']}")
            assert db.stats()["dax"] is None
        shutil.rmtree("/opt/plain")


def written(backend: str, values: np.ndarray) -> None:
    """What one backend writes on DAX: through which mapping, what it says of it, and that it is there afterwards."""
    with check(f"the writer's mapping is synchronous (VmFlags sf), {backend}") as seen:
        flags: list[list[str]] = []
        populate = vm.populate_write

        def spy(address: int, nbytes: int) -> None:
            populate(address, nbytes)
            # Two mappings are laid at an address, one after the other; the last one is the one written through.
            flags[:] = [found for found in flags if found[0] != hex(address)] + [[hex(address), *flags_of(address)]]

        vm.populate_write = spy
        threads, CREW.share = CREW.share, lambda work, n, threads=1: [work(i) for i in range(n)]
        try:
            with create("spied", backend=backend) as db:
                for value in values:
                    db.put(value[None])
                    seen[:] = [" ".join(flags[-1][1:])]
                    assert all("sf" in found for found in flags), flags
                    flags.clear()
        finally:
            vm.populate_write, CREW.share = populate, threads

    with check(f'stats()["dax"], {backend}') as seen:
        with memodb.MemoDB.open(MOUNT / "spied") as db:
            stats = db.stats()
        kind = LAYOUT.split(",")[0]
        seen.append(f"{stats['filesystem']}: {json.dumps(stats['dax'])}")
        assert stats["filesystem"] == f"{kind}, DAX"
        assert stats["dax"] == {"mount_option": "dax=always", "map_sync": True, "flush": FLUSH[backend]}

    with check(f"mounted again: every byte is there, {backend}") as seen:
        device = subprocess.run(["findmnt", "-no", "SOURCE", MOUNT], check=True, capture_output=True, text=True).stdout
        subprocess.run(["umount", MOUNT], check=True)
        subprocess.run(["mount", "-o", "dax=always", device.strip(), MOUNT], check=True)
        with memodb.MemoDB.open(MOUNT / "spied") as db:
            assert_same_bytes(db.multiget(range(4)), values)
            assert db.verify() == []
        seen.append("4 records, verify() finds nothing")
        shutil.rmtree(MOUNT / "spied")


def median_ms(work: Callable[[], object], rounds: int = 3) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def pages() -> None:
    """How large the page-table entries of a mapped gather are, and what a gather takes, for each backend."""
    for backend in FLUSH:
        pages_of(backend)


def pages_of(backend: str) -> None:
    values = random_records(RECORDS, SHAPE, "float16")
    wanted = np.random.default_rng(1).permutation(RECORDS)[:WANTED]
    with create("pages", backend=backend) as db:
        # In several puts: the segment grows, as stores do.
        ids = np.concatenate([db.put(values[i : i + 5]) for i in range(0, RECORDS, 5)])
        with check(f"entries of 2 MiB, gather of {WANTED} x {NBYTES / 1e6:.2f} MB, {backend}") as seen:
            with db.multiget_mapped(ids[wanted], strategy="map") as batch:
                assert batch.zero_copy
                assert_same_bytes(batch.numpy(), values[wanted])
                entered = vm.entered_pages(batch.numpy().ctypes.data, batch.nbytes)
            assert entered is not None, "this kernel does not tell"
            present, huge = entered
            with db.multiget_mapped(ids[wanted]) as batch:
                auto = "maps" if batch.zero_copy else "copies"
            stats = db.stats()
            share = stats["huge_page_share"]
            seen.append(f'{huge // (2 * MIB)} of {present // (2 * MIB)}; huge_page_share {share:.2f}, "auto" {auto}')
            assert present == WANTED * NBYTES
            assert (huge == present and share == 1) or not WHOLE, stats["huge_page_note"]

        with check(f"gather, read and release in ms (emulated!), {backend}") as seen:

            def gather(strategy: str) -> None:
                with db.multiget_mapped(ids[wanted], strategy=strategy) as batch:
                    batch.numpy().view(np.uint64).max()

            warm = values[wanted]
            took = {"map": median_ms(lambda: gather("map")), "copy": median_ms(lambda: gather("copy"))}
            took['"multiget" into a warm tensor'] = median_ms(lambda: db.multiget(ids[wanted], out=warm))
            took["floor (reading a warm tensor)"] = median_ms(lambda: warm.view(np.uint64).max())
            seen.append(", ".join(f"{name} {ms:.0f}" for name, ms in took.items()))

    with check(f"put of {WANTED * NBYTES // MIB} MiB in ms (emulated!), {backend}") as seen:
        took = {}
        for name, synchronous in (("MAP_SYNC", True), ("pwrite", False)):
            can = vm.can_map_synchronously
            vm.can_map_synchronously = can if synchronous else lambda fd: False
            try:
                with create(name, backend=backend) as db:
                    took[name] = median_ms(lambda db=db: db.put(values[:WANTED]), 1)
                    assert db.stats()["dax"]["map_sync"] == synchronous
                    assert_same_bytes(db.multiget(range(WANTED)), values[:WANTED])
            finally:
                vm.can_map_synchronously = can
            shutil.rmtree(MOUNT / name)
        seen.append(", ".join(f"{name} {ms:.0f}" for name, ms in took.items()))
    shutil.rmtree(MOUNT / "pages")


def inode() -> None:
    """With dax=inode the attribute of a directory decides."""
    with check("chattr +x on one of two directories") as seen:
        values = random_records(1, SHAPE, "float16")
        for name in ("with", "without"):
            folder = MOUNT / name
            folder.mkdir()
            if name == "with":
                subprocess.run(["xfs_io", "-c", "chattr +x", folder], check=True)
            with create("store", folder) as db:
                assert_same_bytes(db.multiget(db.put(values)), values)
                stats = db.stats()
            seen.append(f"{name}: {stats['filesystem']}, {json.dumps(stats['dax'])}")
            assert (stats["dax"] is not None) == (name == "with")
            if name == "with":
                assert stats["dax"]["mount_option"] == "dax=inode"
                assert stats["dax"]["map_sync"]


def node() -> None:
    """A tmpfs with mpol= keeps a store on that node, collapsed huge pages included: as CXL memory is used."""
    MOUNT.mkdir(exist_ok=True)
    options = "size=200m,mpol=bind:1"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", MOUNT], check=True)
    try:
        with check(f"{options}: where the pages lie") as seen, create("store") as db:
            values = random_records(RECORDS, SHAPE, "float16")
            ids = db.put(values)
            with db.multiget_mapped(ids, strategy="map") as batch:
                assert_same_bytes(batch.numpy(), values)
                nodes: dict[str, int] = {}
                for line in Path("/proc/self/numa_maps").read_text().splitlines():
                    if f"file={MOUNT}" in line:
                        for word in line.split():
                            if word[:1] == "N" and word[1:2].isdigit():
                                name, _, n = word.partition("=")
                                nodes[name] = nodes.get(name, 0) + int(n)
            share = db.stats()["huge_page_share"]
            seen.append(f"pages of 4 KiB by node: {nodes}; huge_page_share {share:.2f}")
            assert nodes.keys() == {"N1"}
            assert nodes["N1"] >= RECORDS * NBYTES // 4096
            # All of it where memory allows; that node is small, and some of it may be in pieces.
            assert share > 0.5
    finally:
        subprocess.run(["umount", MOUNT], check=True)


if __name__ == "__main__":
    {"writer": writer, "pages": pages, "inode": inode, "node": node}[PART]()
