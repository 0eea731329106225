"""Condensed stores: what the means are, what they tell of themselves, what is refused, and what reuse makes of them."""

from __future__ import annotations

import dataclasses
import importlib
import json
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tiny_models import PADDED, join, logits, records_by_length, reference_logits, tiny_batch, tiny_model  # noqa: E402

import memodb  # noqa: E402
import memodb_transformers as mt  # noqa: E402
from memodb_transformers.beside import read_condensed  # noqa: E402

LENGTHS = [5] * 7 + [9] * 4 + [16]
NBYTES = 4 * PADDED * PADDED * 4
BARE: dict[str, Any] = {"embedder": "projection", "profile": False}


@pytest.fixture
def built(path: Path) -> Path:
    """A store of single records: seven sequences of 5 tokens, four of 9 and one of 16, in two layers."""
    mt.build(tiny_model(), [tiny_batch(LENGTHS)], path, **BARE)
    return path


@pytest.fixture
def out(path: Path) -> Path:
    return path.with_name("means")


def content(path: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read ids, keys and records of a namespace."""
    with memodb.MemoDB.open(path) as db:
        ids = db.ids(name)
        return ids, db.keys(ids), db.multiget(ids)


def whole(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    with memodb.MemoDB.open(path) as db:
        assert db.verify() == []
        ids = db.ids()
        return db.namespace_of(ids), db.keys(ids), db.multiget(ids)


def test_one_mean_a_namespace_is_the_arithmetic_mean(built: Path, out: Path) -> None:
    report = mt.condense(built, out, records_per_namespace=1)
    assert (report.source_records, report.records) == (24, 6)
    assert (report.source_bytes, report.bytes) == (24 * NBYTES, 6 * NBYTES)
    assert report.left_out == ()
    told = read_condensed(out)
    assert told is not None
    assert (told.records_per_namespace, told.by) == (1, "layer")
    for layer in range(2):
        for length, count in ((5, 7), (9, 4), (16, 1)):
            _, keys, records = content(built, f"layer={layer}/len={length}")
            ids, key, mean = content(out, f"layer={layer}/len={length}")
            assert len(ids) == 1
            np.testing.assert_allclose(mean[0], records.mean(axis=0), atol=1e-6)
            np.testing.assert_allclose(key[0], keys.mean(axis=0), atol=1e-5)
            apart = ((records - records.mean(axis=0)) ** 2).sum(axis=(1, 2, 3)).mean()
            assert told.sizes[ids[0]] == count
            assert told.spreads[ids[0]] == pytest.approx(apart, rel=1e-3, abs=1e-4)
    assert "6 instead of 24" in report.to_markdown()
    assert json.loads(json.dumps(report.to_dict()))["records"] == 6


def test_clusters_are_means_of_their_members(built: Path, out: Path) -> None:
    mt.condense(built, out, records_per_namespace=3)
    told = read_condensed(out)
    assert told is not None
    for layer in range(2):
        for length, count in ((5, 7), (9, 4)):
            _, source_keys, source = content(built, f"layer={layer}/len={length}")
            ids, keys, means = content(out, f"layer={layer}/len={length}")
            assert len(ids) == 3
            assert told.sizes[ids].sum() == count
            nearest = ((source_keys[:, None] - keys[None]) ** 2).sum(axis=2).argmin(axis=1)
            for place, number in enumerate(ids):
                members = nearest == place
                assert members.sum() == told.sizes[number]
                np.testing.assert_allclose(means[place], source[members].mean(axis=0), atol=1e-6)


def test_rows_of_probabilities_stay_probabilities(built: Path, out: Path) -> None:
    mt.condense(built, out, records_per_namespace=2)
    for layer in range(2):
        for length in (5, 9, 16):
            _, _, records = content(out, f"layer={layer}/len={length}")
            assert (records >= 0).all()
            np.testing.assert_allclose(records[:, :, :length].sum(axis=-1), 1.0, atol=1e-5)
            assert not records[..., length:].any()


def test_more_means_than_records_keeps_single_records(built: Path, out: Path) -> None:
    report = mt.condense(built, out, records_per_namespace=100)
    assert (report.records, report.records_per_namespace) == (24, 7)
    told = read_condensed(out)
    assert told is not None
    assert (told.sizes == 1).all()
    for name in {f"layer={layer}/len={length}" for layer in range(2) for length in (5, 9, 16)}:
        _, keys, records = content(built, name)
        _, same_keys, same = content(out, name)
        np.testing.assert_array_equal(same, records)
        np.testing.assert_array_equal(same_keys, keys)


@pytest.mark.parametrize(
    ("room", "records", "left_out"),
    [
        (2, 2, (9, 16)),  # one of 5 tokens for each layer
        (5, 4, (16,)),
        (6, 6, ()),
        (9, 6, ()),  # a second mean of both lengths does not fit
        (10, 10, ()),
        (24, 24, ()),
        (1000, 24, ()),
    ],
)
def test_bytes_are_kept_to_and_the_rarest_lengths_left_out(
    built: Path, out: Path, room: int, records: int, left_out: tuple[int, ...]
) -> None:
    report = mt.condense(built, out, max_bytes=room * NBYTES)
    assert (report.records, report.left_out) == (records, left_out)
    assert report.bytes <= room * NBYTES
    with memodb.MemoDB.open(out) as db:
        found = {int(name.rpartition("=")[2]) for name, count in db.namespaces().items() if count}
    assert found == {5, 9, 16} - set(left_out)


def test_both_limits_hold(built: Path, out: Path) -> None:
    report = mt.condense(built, out, max_bytes=24 * NBYTES, records_per_namespace=2)
    assert (report.records, report.records_per_namespace) == (10, 2)


def test_no_room_for_a_record_of_each_layer_is_said(built: Path, out: Path) -> None:
    with pytest.raises(ValueError, match=f"{2 * NBYTES} bytes"):
        mt.condense(built, out, max_bytes=2 * NBYTES - 1)
    assert not out.exists()


def test_only_clusters_of_sequences_serve_lookups_by_sequence(built: Path, out: Path) -> None:
    model, other = tiny_model(), out.with_name("by layer")
    known = tiny_batch(LENGTHS)
    mt.condense(built, out, records_per_namespace=2, by="sequence")
    mt.condense(built, other, records_per_namespace=2)
    with mt.memoize(model, out, threshold=1e3, layers="all", lookup="sequence") as memo:
        logits(model, known)
    assert memo.stats()["memoization_rate"] == 1.0
    with (
        pytest.raises(mt.StoreMismatchError, match="by='sequence'"),
        mt.memoize(model, other, threshold=1e3, layers="all", lookup="sequence"),
    ):
        pass
    # All layers of a sequence belong together: the same members in both, so the same sizes.
    told = read_condensed(out)
    assert told is not None
    for length in (5, 9, 16):
        first, second = (told.sizes[content(out, f"layer={layer}/len={length}")[0]] for layer in range(2))
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("dtype", "atol"), [("float16", 1e-3), ("bfloat16", 8e-3), ("float8_e4m3fn", 7e-2)])
def test_means_can_be_of_another_dtype(built: Path, out: Path, dtype: str, atol: float) -> None:
    exact = out.with_name("exact")
    mt.condense(built, exact, records_per_namespace=2)
    report = mt.condense(built, out, records_per_namespace=2, store_dtype=dtype)
    assert report.bytes == report.records * NBYTES * (1 if "8" in dtype else 2) // 4
    _, _, means = whole(exact)
    with memodb.MemoDB.open(out) as db:
        assert db.spec.dtype_name == dtype
        np.testing.assert_allclose(db.multiget(db.ids()).astype(np.float32), means, atol=atol)
    model = tiny_model()
    with mt.memoize(model, out, threshold=1e3, layers="all") as memo:
        logits(model, tiny_batch(LENGTHS))
    assert memo.stats()["memoization_rate"] == 1.0


def test_contexts_are_condensed_too(path: Path, out: Path) -> None:
    mt.build(tiny_model(), [tiny_batch(LENGTHS)], path, target="context", **BARE)
    mt.condense(path, out, records_per_namespace=1)
    _, _, contexts = content(path, "layer=1/len=5")
    _, _, mean = content(out, "layer=1/len=5")
    np.testing.assert_allclose(mean[0], contexts.mean(axis=0), atol=1e-5)


def test_each_bucket_is_condensed(path: Path, out: Path) -> None:
    batches = [tiny_batch([5] * 6, padded=8), tiny_batch([12] * 6)]
    mt.build(tiny_model(), batches, path, buckets=(8, PADDED), **BARE)
    report = mt.condense(path, out, records_per_namespace=2)
    assert sorted(part.name for part in out.iterdir()) == ["L=16", "L=8"]
    assert [part.records for part in report.buckets] == [4, 4]
    assert (report.source_records, report.records) == (24, 8)
    assert report.bytes == sum(part.bytes for part in report.buckets)
    assert report.path == str(out)
    assert [part.path for part in report.buckets] == [str(out / "L=16"), str(out / "L=8")]
    model = tiny_model()
    with mt.memoize(model, out, threshold=1e3, layers="all") as memo:
        for batch in batches:
            logits(model, batch)
    assert memo.stats()["memoization_rate"] == 1.0


def test_a_group_may_enter_the_folder_of_buckets(path: Path, out: Path) -> None:
    batches = [tiny_batch([5] * 6, padded=8), tiny_batch([12] * 6)]
    mt.build(tiny_model(), batches, path, buckets=(8, PADDED), permissions=0o750, **BARE)
    mt.condense(path, out, records_per_namespace=2, permissions=0o750)
    copied = out.with_name("copied")
    mt.copy(path, copied, permissions=0o750)
    for folder in (path, out, copied):
        assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((folder / "L=8").stat().st_mode) == 0o750


@pytest.mark.parametrize("verb", ["condense", "copy"])
@pytest.mark.parametrize("happens", ["stopped", "another one is quicker"])
def test_buckets_stand_at_their_place_when_all_are_whole(
    path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, verb: str, happens: str
) -> None:
    batches = [tiny_batch([5] * 6, padded=8), tiny_batch([12] * 6)]
    mt.build(tiny_model(), batches, path, buckets=(8, PADDED), **BARE)
    # The package's `condense` is the function.
    module: Any = importlib.import_module(f"memodb_transformers.{'condense' if verb == 'condense' else 'transfer'}")
    original, done = module.copy_beside, []

    def second(*arguments: Any, **options: Any) -> None:
        original(*arguments, **options)
        done.append(arguments)
        assert not out.exists()
        if len(done) == 2 and happens == "stopped":
            raise KeyboardInterrupt
        if len(done) == 2:
            out.mkdir()
            (out / "mine").write_text("kept")

    monkeypatch.setattr(module, "copy_beside", second)
    with pytest.raises(KeyboardInterrupt if happens == "stopped" else memodb.StoreExistsError):
        getattr(mt, verb)(path, out)
    assert len(done) == 2
    assert sorted(entry.name for entry in path.parent.iterdir()) == sorted(
        [path.name] + ([] if happens == "stopped" else [out.name])
    )
    if happens != "stopped":
        assert [entry.name for entry in out.iterdir()] == ["mine"]


def test_means_are_not_condensed_again(built: Path, out: Path) -> None:
    mt.condense(built, out, records_per_namespace=2)
    third = out.with_name("third")
    with pytest.raises(mt.StoreMismatchError, match="single records"):
        mt.condense(out, third)
    assert not third.exists()


def test_what_exists_is_not_touched(built: Path, out: Path) -> None:
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(memodb.StoreExistsError):
        mt.condense(built, out)
    assert (out / "mine").read_text() == "kept"
    with pytest.raises(memodb.StoreExistsError):
        mt.condense(built, built)
    assert len(whole(built)[0]) == 24


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"records_per_namespace": 0}, "records_per_namespace"),
        ({"records_per_namespace": 1.5}, "records_per_namespace"),
        ({"max_bytes": True}, "max_bytes"),
        ({"by": "token"}, "layer, sequence"),
        ({"store_dtype": "int8"}, "float16"),
        ({"store_dtype": "float64"}, "float16"),
        ({"seed": -1}, "seed"),
        ({"seed": "one"}, "seed"),
    ],
)
def test_options_are_checked(built: Path, out: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mt.condense(built, out, **arguments)
    assert not out.exists()


def test_an_unknown_backend_leaves_nothing(built: Path, out: Path) -> None:
    with pytest.raises(memodb.MemoDBError, match="tape"):
        mt.condense(built, out, backend="tape")
    assert not out.exists()


def test_what_is_no_memo_store_is_refused(path: Path, out: Path) -> None:
    with pytest.raises(mt.StoreMismatchError, match="no memo store"):
        mt.condense(path, out)
    with memodb.MemoDB.create(path, shape=(2,), dtype="float32"):
        pass
    with pytest.raises(mt.StoreMismatchError, match="no memo store"):
        mt.condense(path, out)
    assert not out.exists()


def test_a_failure_leaves_nothing(built: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = memodb.MemoDB.put, []

    def put(self: memodb.MemoDB, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *arguments, **named)

    monkeypatch.setattr(memodb.MemoDB, "put", put)
    with pytest.raises(KeyboardInterrupt):
        mt.condense(built, out)
    monkeypatch.undo()
    assert not out.exists()
    assert len(whole(built)[0]) == 24
    assert mt.condense(built, out).records == 24  # 16 a namespace, and there are 7 at most


@pytest.mark.parametrize("by", ["layer", "sequence"])
def test_a_large_source_is_streamed_in_parts(built: Path, out: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    at_once = out.with_name("at once")
    mt.condense(built, at_once, records_per_namespace=4, by=by)
    largest, original = [], memodb.MemoDB.multiget_mapped

    def multiget_mapped(self: memodb.MemoDB, ids: Any, *arguments: Any) -> Any:
        largest.append(len(ids))
        return original(self, ids, *arguments)

    module = sys.modules["memodb_transformers.condense"]
    monkeypatch.setattr(module, "_READ", 2 * NBYTES)
    monkeypatch.setattr(module, "_SUMS", 3 * NBYTES)
    monkeypatch.setattr(memodb.MemoDB, "multiget_mapped", multiget_mapped)
    mt.condense(built, out, records_per_namespace=4, by=by)
    assert max(largest) == 2
    assert sum(largest) == 24
    assert len(whole(out)[0]) == len(whole(at_once)[0]) == 18
    for layer in range(2):
        for length in (5, 9, 16):
            (ids, keys, means), (others, other_keys, same) = (
                content(place, f"layer={layer}/len={length}") for place in (out, at_once)
            )
            np.testing.assert_allclose(keys, other_keys, atol=1e-5)
            np.testing.assert_allclose(means, same, atol=1e-6)
            (told, same_told) = (read_condensed(place) for place in (out, at_once))
            assert told is not None
            assert same_told is not None
            np.testing.assert_array_equal(told.sizes[ids], same_told.sizes[others])


def test_the_same_seed_gives_the_same_store(built: Path, out: Path) -> None:
    again = out.with_name("again")
    mt.condense(built, out, records_per_namespace=3, seed=5)
    mt.condense(built, again, records_per_namespace=3, seed=5)
    names, keys, records = whole(out)
    same_names, same_keys, same = whole(again)
    assert names == same_names
    np.testing.assert_array_equal(keys, same_keys)
    np.testing.assert_array_equal(records, same)


def test_no_profile_is_taken_over(path: Path, out: Path) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([8] * 180)], path, embedder="projection", budget=100.0)
    beside = {file.name for file in (path / "transformers").iterdir()}
    assert {"profile.json", "tuned.json", "build.json"} <= beside
    mt.condense(path, out, records_per_namespace=2)
    found = {file.name for file in (out / "transformers").iterdir()}
    assert found == beside - {"profile.json", "tuned.json", "build.json"} | {
        "cluster-sizes.npy", "cluster-spreads.npy",
    }  # fmt: skip
    with pytest.raises(mt.StoreMismatchError, match="no profile"), mt.memoize(model, out):
        pass
    with pytest.raises(mt.StoreMismatchError, match="not tuned"), mt.memoize(model, out, level="tuned"):
        pass
    # Sequences that are in no mean at all are not there: the profile of a condensed store is of other data.
    report = mt.profile(model, [tiny_batch([8] * 12, seed=77)], out)
    assert report.sequences == 12
    with mt.memoize(model, out, layers="all", level=0.0) as memo:
        logits(model, tiny_batch([8] * 4, seed=78))
    assert memo.layers == [0, 1]


def test_a_copy_keeps_what_the_means_tell(built: Path, out: Path) -> None:
    copied = out.with_name("copied")
    mt.condense(built, out, records_per_namespace=2)
    mt.copy(out, copied, backend="files")
    told, same = read_condensed(out), read_condensed(copied)
    assert told is not None
    assert same is not None
    assert dataclasses.astuple(told)[:2] == dataclasses.astuple(same)[:2]
    np.testing.assert_array_equal(told.sizes, same.sizes)
    np.testing.assert_array_equal(told.spreads, same.spreads)


def test_damaged_sizes_are_said(built: Path, out: Path) -> None:
    mt.condense(built, out, records_per_namespace=2)
    np.save(out / "transformers" / "cluster-sizes.npy", np.zeros(3, dtype=np.float32))
    with (
        pytest.raises(mt.StoreMismatchError, match="condense the store again"),
        mt.memoize(tiny_model(), out, threshold=1.0, layers="all"),
    ):
        pass


def test_hits_reuse_the_mean(built: Path, out: Path) -> None:
    model = tiny_model()
    mt.condense(built, out, records_per_namespace=1)
    fresh = join(tiny_batch([5, 9, 7], seed=40), tiny_batch([16, 5], seed=41))
    expected = reference_logits(model, fresh, [records_by_length(out, layer) for layer in range(2)])
    with mt.memoize(model, out, threshold=1e3, layers="all") as memo:
        found = logits(model, fresh)
    assert [row["hits"] for row in memo.stats()["layers"]] == [4, 4]
    assert torch.allclose(found, expected, atol=1e-4)


def test_build_condenses_within_the_limit_of_the_store(path: Path) -> None:
    report = mt.build(tiny_model(), [tiny_batch(LENGTHS)], path, records_per_namespace=1, max_bytes=64 << 20, **BARE)
    assert report.condensed is not None
    assert (report.condensed.source_records, report.records) == (24, 6)
