"""What would silently be wrong: it takes the original path, or is refused by name."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import FAMILIES, PADDED, join, logits, rows_of, snapshot, states, tiny_batch, tiny_model  # noqa: E402

import memodb  # noqa: E402
import memodb_transformers as mt  # noqa: E402

ANY_DISTANCE = 1e9
ITSELF = 1e-4
LENGTHS = [5, 9, 16]


def hits(memo: mt.Memo) -> list[int]:
    return [row["hits"] for row in memo.stats()["layers"]]


def built(path: Path, family: str = "bert", **settings: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    model = tiny_model(family, **settings)
    batch = tiny_batch(LENGTHS)
    mt.build(model, [batch], path, profile=False)
    return model, batch


@pytest.mark.parametrize("family", ["llama", "modernbert", "bert"])
@pytest.mark.parametrize("kind", ["projection", "mlp"])
def test_no_two_orders_of_the_same_tokens_are_taken_for_each_other(path: Path, family: str, kind: str) -> None:
    # LLaMA's and ModernBERT's first hidden states hold no positions: swapped tokens are swapped rows.
    model = tiny_model(family)
    known = tiny_batch([PADDED])
    embedder = mt.LinearMLP.create(PADDED, 32, 2) if kind == "mlp" else kind
    mt.build(model, [known], path, profile=False, embedder=embedder)
    ids = known["input_ids"][0]
    swapped = []
    for first in range(PADDED):
        for second in range(first):
            if ids[first] != ids[second]:
                row = ids.clone()
                row[first], row[second] = ids[second], ids[first]
                swapped.append(row)
    batch = {"input_ids": torch.stack(swapped), "attention_mask": torch.ones(len(swapped), PADDED).long()}
    for lookup in ("layer", "sequence"):
        with mt.memoize(model, path, threshold=1e-6, layers="all", lookup=lookup) as memo:
            states(model, batch)
        assert hits(memo) == [0, 0]


def test_causal_models_made_bidirectional_are_refused(path: Path) -> None:
    for family in ("llama", "gpt2"):
        model = tiny_model(family)
        model.config.is_causal = False
        with pytest.raises(mt.UnsupportedModelError, match="is_causal=False"):
            mt.build(model, [tiny_batch(LENGTHS)], path)
    assert not path.exists()


def test_arguments_that_attention_functions_may_heed_take_the_original_path(path: Path) -> None:
    model, _ = built(path)
    batch = {"input_ids": tiny_batch([PADDED] * 2)["input_ids"]}
    with torch.no_grad():
        plain = model.bert(**batch, is_causal=True)[0]
        with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
            found = model.bert(**batch, is_causal=True)[0]
            assert hits(memo) == [0, 0]
            assert torch.equal(found, plain)
            model.bert(**batch, output_hidden_states=True)
            assert hits(memo) == [2, 2]


def test_an_attention_implementation_that_nobody_knows_is_refused(path: Path) -> None:
    def sharp(module: Any, query: Any, *rest: Any, **settings: Any) -> Any:
        return transformers.AttentionInterface()["sdpa"](module, 3 * query, *rest, **settings)

    transformers.AttentionInterface.register("sharp", sharp)
    model, batch = built(path)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
        model.config._attn_implementation = "sharp"
        found = logits(model, batch)
    assert hits(memo) == [0, 0]
    assert torch.equal(found, logits(model, batch))
    for attempt in (
        lambda: mt.build(model, [batch], path.with_name("other")),
        lambda: mt.memoize(model, path).__enter__(),
    ):
        with pytest.raises(mt.UnsupportedModelError, match="'sharp' is not known"):
            attempt()


def negate_queries(model: Any) -> None:
    with torch.no_grad():
        model.base_model.encoder.layer[0].attention.self.query.weight.neg_()


def add_noise(model: Any) -> None:
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))


def adapt(model: Any) -> None:
    class Adapter(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base, self.more = base, torch.nn.Linear(32, 32, bias=False)

        @property
        def weight(self) -> torch.Tensor:
            return self.base.weight

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.base(hidden) + self.more(hidden)

    attention = model.base_model.encoder.layer[1].attention.self
    attention.query = Adapter(attention.query)


def other_mlp(model: Any) -> None:
    with torch.no_grad():
        model.base_model.encoder.layer[0].output.dense.weight.mul_(-1.0)


@pytest.mark.parametrize("change", [negate_queries, add_noise, adapt, other_mlp])
def test_a_model_that_computes_something_else_is_refused(path: Path, change: Any) -> None:
    model, batch = built(path)
    with mt.memoize(model, path, threshold=ITSELF, layers="all"):
        pass
    change(model)
    before = snapshot(model)
    for attempt in (
        lambda: mt.memoize(model, path, threshold=ITSELF, layers="all").__enter__(),
        lambda: mt.profile(model, [batch], path),
    ):
        with pytest.raises(mt.StoreMismatchError, match="computes something else"):
            attempt()
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_parameters"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("deberta-v2", {"position_buckets": 8}, "position_buckets"),
        ("modernbert", {"local_attention": 4}, "local_attention"),
    ],
)
def test_another_setting_of_attention_is_refused_by_name(
    path: Path, family: str, settings: dict[str, Any], said: str
) -> None:
    built(path, family)
    other = tiny_model(family, **settings)
    with pytest.raises(mt.StoreMismatchError, match=said), mt.memoize(other, path, threshold=1.0, layers="all"):
        pass


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_embeddings_of_another_scale_are_not_taken_for_the_same_sequence(path: Path, family: str) -> None:
    # The first attention sees them normalised; the layers after it do not.
    model, _ = built(path, family)
    embeddings = model.get_input_embeddings()(tiny_batch([PADDED])["input_ids"]).detach()
    plain = states(model, {"inputs_embeds": 3 * embeddings, "attention_mask": torch.ones(1, PADDED).long()})
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all", lookup="sequence") as memo:
        found = states(model, {"inputs_embeds": 3 * embeddings, "attention_mask": torch.ones(1, PADDED).long()})
    assert hits(memo) == [0, 0]
    assert torch.equal(found, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_that_is_active_in_a_part_of_the_model_stays_active(path: Path, family: str) -> None:
    model, batch = built(path, family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
            module.train()
    attention = [m for m in model.modules() if type(m).__name__ == mt_attention_class(family)]
    for module in attention:
        module.train()
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
        states(model, batch)
    assert hits(memo) == [0, 0]


def mt_attention_class(family: str) -> str:
    return next(row.attention_class for row in mt.families() if row.name == family)


def test_a_gradient_is_missed_even_where_the_input_needs_none(path: Path) -> None:
    model, batch = built(path)
    for parameter in model.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers=[0]) as memo:
        loss = model(**batch).logits.sum()
        assert hits(memo) == [3, 0]
        with pytest.raises(mt.GradientUnavailableError):
            loss.backward()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers=[0]):
        assert not model(**batch).logits.requires_grad


def test_a_gradient_through_the_cache_is_missed_too(path: Path) -> None:
    model, _ = built(path, "llama")
    batch = tiny_batch([PADDED])
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
        cache = model(**batch, use_cache=True).past_key_values
        assert hits(memo) == [1, 1]
        later = model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits.sum()
        with pytest.raises(mt.GradientUnavailableError):
            later.backward()


@pytest.mark.parametrize("work", ["build", "profile"])
def test_another_thread_s_forwards_are_neither_recorded_nor_disturbed(path: Path, work: str) -> None:
    model, batch = built(path)
    other = tiny_batch([7, 7], seed=5)
    expected = logits(model, other)
    served: list[torch.Tensor] = []
    turn, answered = threading.Semaphore(0), threading.Semaphore(0)

    def serve() -> None:
        while turn.acquire() and not done:
            try:
                served.append(logits(model, other))
            finally:
                answered.release()

    done: list[int] = []
    thread = threading.Thread(target=serve)
    thread.start()
    layer = model.bert.encoder.layer[0].attention.self
    inside = threading.local()

    def interrupt(*_: object) -> None:
        # In the middle of our forward, the other thread makes one of its own.
        if threading.current_thread() is not thread and not getattr(inside, "running", False):
            inside.running = True
            turn.release()
            answered.acquire()
            inside.running = False

    handle = layer.register_forward_pre_hook(interrupt)
    try:
        if work == "build":
            report = mt.build(model, [batch] * 4, path.with_name("other"), profile=False)
            with memodb.MemoDB.open(path.with_name("other")) as db:
                assert len(db) == report.records == 24
                assert not len(db.ids(namespace="layer=0/len=7"))
        else:
            assert mt.profile(model, [tiny_batch(LENGTHS, seed=9)], path).sequences == 3
    finally:
        handle.remove()
        done.append(1)
        turn.release()
        thread.join()
    assert served
    assert all(torch.allclose(found, expected, atol=1e-5) for found in served)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "gpt2", "llama"])
@pytest.mark.parametrize("lookup", ["layer", "sequence"])
def test_autocast_works(path: Path, family: str, lookup: str) -> None:
    model = tiny_model(family)
    known, new = tiny_batch(LENGTHS), tiny_batch([5, 9], seed=2)
    batch = join(known, new)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mt.build(model, [known], path, profile=False)
        plain = states(model, batch)
        with mt.memoize(model, path, threshold=1e-2, layers="all", lookup=lookup) as memo:
            found = states(model, batch)
    assert hits(memo)[0] == 3
    assert (found - plain).abs().mean() < 0.05 * plain.abs().mean()


def test_parts_that_are_compiled_and_compiling_inside_the_block_are_refused_by_name(path: Path) -> None:
    model, batch = built(path)
    with (
        mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo,
        pytest.raises(Exception, match="neither compiled nor traced") as caught,
    ):
        logits(torch.compile(model, backend="eager", fullgraph=True), batch)
    assert "UnsupportedModelError" in repr(caught.value) + str(caught.value)
    assert hits(memo) == [0, 0]
    torch._dynamo.reset()
    whole = model.bert.encoder
    model.bert.encoder = torch.compile(whole, backend="eager")
    with pytest.raises(mt.UnsupportedModelError, match="compiled"), mt.memoize(model, path):
        pass
    model.bert.encoder = whole
    whole.layer[0].attention.self = torch.compile(whole.layer[0].attention.self, backend="eager")
    with pytest.raises(mt.UnsupportedModelError, match="compiled"), mt.memoize(model, path):
        pass


def test_a_bucket_without_a_profile_memoizes_nothing_and_spoils_nothing(path: Path) -> None:
    model = tiny_model(initializer_range=0.05)  # flat attention: a level can be reached
    few, many = tiny_batch([8] * 4, padded=8), tiny_batch([PADDED] * 20)
    report = mt.build(model, [few, many], path, buckets=(8, 16))
    assert [bucket.profile is None for bucket in report.buckets] == [True, False]
    with mt.memoize(model, path, layers="all") as memo:
        assert torch.equal(logits(model, few), logits(model, few))
        assert set(memo.stats()["layers"][0]["threshold"]) == {16}
    mt.evaluate(model, [few, many], path, levels=["moderate"], layers="all", repeats=1)
    for number in (8, 16):
        (path / f"L={number}" / "transformers" / "profile.json").unlink(missing_ok=True)
    with pytest.raises(mt.StoreMismatchError, match="no profile"), mt.memoize(model, path):
        pass


def test_layers_that_do_not_run_are_not_recorded(path: Path) -> None:
    model = tiny_model("llama", layers=3)
    model.config.num_hidden_layers = 2
    with pytest.raises(mt.UnsupportedModelError, match=r"each of the 3 attention layers .* layers \[0, 1\]"):
        mt.build(model, [tiny_batch(LENGTHS)], path)
    assert not path.exists()


def test_counters_may_be_set_back_in_the_middle_of_a_forward(path: Path) -> None:
    model, batch = built(path)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
        handle = model.bert.encoder.layer[0].register_forward_hook(lambda *_: memo.reset_stats())
        logits(model, batch)
        handle.remove()
        assert hits(memo) == [0, 3]
        assert memo.stats()["memoization_rate"] == 0.5


def test_an_interrupted_forward_leaves_no_lengths_behind(path: Path) -> None:
    model, batch = built(path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo, torch.no_grad():
        handle = model.bert.encoder.layer[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**batch)
        handle.remove()
        assert hits(memo) == [3, 0]
        model.bert.encoder(torch.randn(3, PADDED, 32))
        assert hits(memo) == [3, 0]


def test_a_hook_that_changes_the_mask_later_is_heeded(path: Path) -> None:
    model, batch = built(path)

    def shorten(_: object, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"].clone()
        mask[2, 9:] = 0
        return args, {**kwargs, "attention_mask": mask}

    with mt.memoize(model, path, threshold=ITSELF, layers="all") as memo:
        handle = model.bert.register_forward_pre_hook(shorten, with_kwargs=True)
        found = logits(model, batch)
    plain = logits(model, batch)
    handle.remove()
    assert hits(memo)[0] == 2
    assert torch.allclose(found, plain, atol=1e-4, rtol=0)


def test_positions_that_all_sequences_share_are_held_out_with_them(path: Path) -> None:
    model = tiny_model()
    positions = torch.arange(PADDED)[None] + 4
    batch = tiny_batch([8] * 20)
    report = mt.build(model, [{**batch, "position_ids": positions}], path)
    assert report.profile is not None
    again = mt.profile(model, [{**batch, "position_ids": positions.expand(20, -1)}], path)
    assert (again.sequences, again.self_hits) == (2, 18)
    assert report.profile.layers[0].distances == pytest.approx(again.layers[0].distances, rel=1e-4)
    # At other positions they are other sequences.
    assert mt.profile(model, [batch], path).self_hits == 0


def test_a_configuration_that_returns_attention_weights_is_heeded(path: Path) -> None:
    model, batch = built(path, attention="eager")
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo, torch.no_grad():
        model.config.output_attentions = True
        output = model(**batch)
    assert hits(memo) == [0, 0]
    assert len(output.attentions) == 2


def test_other_kinds_of_caches_take_the_original_path(path: Path) -> None:
    model, batch = built(path, "llama")
    batch = rows_of(batch, [2])
    config = model.config
    caches = {
        "static": lambda: transformers.StaticCache(config=config, max_cache_len=32),
        "sliding": lambda: sliding(config),
        "offloaded": lambda: transformers.DynamicCache(config=config, offloading=True),
    }
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo, torch.no_grad():
        for kind, make in caches.items():
            if kind == "offloaded" and not torch.cuda.is_available():
                continue
            found = model(**batch, past_key_values=make()).logits
            assert hits(memo) == [0, 0], kind
            assert torch.isfinite(found).all()


def sliding(config: Any) -> Any:
    windowed = type(config)(**{**config.to_dict(), "sliding_window": 8, "layer_types": ["sliding_attention"] * 2})
    return transformers.DynamicCache(config=windowed)


def test_queries_and_keys_are_not_computed_by_slices_either(path: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for family in ("gpt2", "deberta", "modernbert", "bert", "llama"):
        store = path.with_name(family)
        model = tiny_model(family, attention="eager").requires_grad_(False)
        batch = tiny_batch([PADDED] * 4)
        mt.build(model, [batch], store, profile=False, embedder="projection")
        settings = {"use_cache": False} if FAMILIES[family].causal else {}
        with FlopCounterMode(display=False) as plain:
            states(model, batch, **settings)
        with (
            mt.memoize(model, store, threshold=ANY_DISTANCE, layers="all") as memo,
            FlopCounterMode(display=False) as found,
        ):
            states(model, batch, **settings)
        assert hits(memo) == [4, 4]
        heads, keys = 4, FAMILIES[family].config.get("num_key_value_heads", 4)
        tokens = 4 * PADDED
        saved = 2 * tokens * 32 * (32 + 8 * keys) + 2 * heads * tokens * PADDED * 8  # Q and K, and scores
        embedding = 2 * 4 * 8 * PADDED * 32 + 2 * 4 * 32 * 128
        assert found.get_total_flops() <= plain.get_total_flops() - 2 * (saved - embedding), family


def test_locks_are_renewed_in_a_forked_child() -> None:
    from memodb_transformers import counting, sites

    before = counting._lock, sites._patching
    counting._renew()
    sites._renew()
    assert counting._lock is not before[0]
    assert sites._patching is not before[1]


def test_leaving_the_block_while_another_thread_is_inside_disturbs_nobody(path: Path) -> None:
    model, batch = built(path)
    plain = logits(model, batch)
    inside, left = threading.Event(), threading.Event()
    found: list[torch.Tensor] = []

    def wait(*_: object) -> None:
        inside.set()
        assert left.wait(60)

    thread = threading.Thread(target=lambda: found.append(logits(model, batch)))
    with mt.memoize(model, path, threshold=ITSELF, layers="all"):
        handle = model.bert.encoder.layer[0].register_forward_pre_hook(wait)
        thread.start()
        assert inside.wait(60)
    left.set()
    thread.join()
    handle.remove()
    assert torch.allclose(found[0], plain, atol=1e-5)


def test_hooks_that_come_inside_the_block_on_fused_projections_are_heeded(path: Path) -> None:
    model, batch = built(path, "gpt2")
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
        handle = model.transformer.h[0].attn.c_attn.register_forward_hook(lambda _, args, output: 2 * output)
        found = states(model, batch)
    plain = states(model, batch)
    handle.remove()
    assert hits(memo)[0] == 0
    assert torch.allclose(found, plain, atol=1e-4) or hits(memo)[1] > 0


def test_a_hook_that_shortens_the_sequence_is_heeded(path: Path) -> None:
    model, _ = built(path)
    batch = {"input_ids": tiny_batch([PADDED])["input_ids"]}
    with torch.no_grad(), mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
        handle = model.bert.encoder.layer[0].register_forward_pre_hook(lambda _, args: (args[0][:, :12], *args[1:]))
        found = model.bert(**batch)[0]
    with torch.no_grad():
        plain = model.bert(**batch)[0]
    handle.remove()
    assert hits(memo) == [0, 0]
    assert torch.equal(found, plain)


def test_a_forward_of_the_user_s_own_given_inside_the_block_is_left_alone(path: Path) -> None:
    model, _ = built(path)
    attention = model.bert.encoder.layer[0].attention.self
    with mt.memoize(model, path, threshold=1.0, layers="all"):
        attention.forward = own = lambda *args, **kwargs: None
    assert attention.forward is own


class MeanEmbedder:
    """An embedder of the user's own."""

    kind = "mean"
    key_dim = 32

    def embed(self, layer: int, hidden: torch.Tensor, lengths: torch.Tensor) -> Any:
        counted = torch.arange(hidden.shape[1])[None, :, None] < lengths[:, None, None]
        return (hidden.float() * counted).sum(dim=1).div(lengths.clamp(min=1)[:, None]).numpy()

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def arrays(self) -> dict[str, Any]:
        return {}


def test_an_embedder_of_the_user_s_own_is_handed_in_again(path: Path) -> None:
    model = tiny_model()
    embedder = MeanEmbedder()
    batch = tiny_batch([8] * 20)
    report = mt.build(model, [batch], path, embedder=embedder)
    assert report.profile is not None
    with pytest.raises(mt.StoreMismatchError, match="handed in as embedder="), mt.memoize(model, path):
        pass
    with mt.memoize(model, path, threshold=ITSELF, layers="all", embedder=embedder) as memo:
        logits(model, batch)
    assert hits(memo) == [18, 18]
    mt.profile(model, [batch], path, embedder=embedder)
    mt.evaluate(model, [batch], path, layers="all", repeats=1, levels=["moderate"], embedder=embedder)
    with pytest.raises(mt.StoreMismatchError, match="expected an embedder of"):
        mt.profile(model, [batch], path, embedder=mt.RandomProjection.create(PADDED, 32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
def test_states_that_are_not_finite_are_neither_recorded_nor_searched(path: Path, value: float) -> None:
    model = tiny_model()
    states_in = torch.randn(3, PADDED, 32)
    good = states_in.clone()
    states_in[1, 3] = value
    handle = model.bert.embeddings.register_forward_hook(lambda _, args, output: states_in)
    batch = {"input_ids": tiny_batch([PADDED] * 3)["input_ids"]}
    try:
        report = mt.build(model, [batch], path, profile=False)
    finally:
        handle.remove()
    assert (report.sequences, report.skipped) == (2, 1)
    mt.build(model, [{"inputs_embeds": good}], path.with_name("other"), profile=False)
    with mt.memoize(model, path.with_name("other"), threshold=ANY_DISTANCE, layers="all") as memo, torch.no_grad():
        handle = model.bert.embeddings.register_forward_hook(lambda _, args, output: states_in)
        model(**batch)
        handle.remove()
    assert memo.stats()["layers"][0]["hits"] == 2


@pytest.mark.parametrize("buckets", [None, (8, 16)])
def test_a_memo_store_is_copied_whole(path: Path, buckets: Any) -> None:
    model = tiny_model()
    batches = [tiny_batch([8] * 20, padded=8), tiny_batch([PADDED] * 20)][0 if buckets else 1 :]
    mt.build(model, batches, path, buckets=buckets)
    target = path.with_name("copied")
    mt.copy(path, target, backend="files")
    for batch in batches:
        with mt.memoize(model, target, threshold=ITSELF, layers="all") as memo:
            logits(model, batch)
        assert hits(memo) == [18, 18]
    with mt.memoize(model, target, level="moderate", layers="all"):
        pass
    with pytest.raises(FileExistsError):
        mt.copy(path, target)
    memodb.MemoDB.create(path.with_name("plain"), shape=(2,), dtype="float32").close()
    with pytest.raises(mt.StoreMismatchError, match="no memo store"):
        mt.copy(path.with_name("plain"), path.with_name("nowhere"))
    assert not path.with_name("nowhere").exists()


def header(dtype: str, shape: str) -> bytes:
    """Make a .npy file that is a header only."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({shape},), }}"
    return b"\x93NUMPY\x01\x00\x76\x00" + text.encode().ljust(117) + b"\n"


DAMAGE = {
    "deep": ("memo.json", b"[" * 200_000),
    "deep profile": ("profile.json", b"[" * 200_000),
    "huge number": ("memo.json", b'"padded_length": 1e400'),
    "zip": ("model-probe.npy", b"PK\x03\x04" + bytes(100)),
    "huge shape": ("embedder-mixing.npy", header("<f4", "1099511627776")),
    "pickle": ("embedder-mixing.npy", header("|O", "1")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_beside_the_database_is_said_to_be_that(path: Path, kind: str) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([8] * 20)], path, embedder="projection")
    name, content = DAMAGE[kind]
    file = path / "transformers" / name
    if kind == "huge number":
        content = file.read_bytes().replace(b'"padded_length": 16', content)
    file.write_bytes(content)
    with pytest.raises(mt.StoreMismatchError, match="damaged"), mt.memoize(model, path):
        pass


@pytest.mark.parametrize("harm", ["narrow", "nan", "other size", "layers", "lengths", "negative"])
def test_parts_that_do_not_fit_are_refused_before_the_model_runs(path: Path, harm: str) -> None:
    import json

    import numpy as np

    model = tiny_model()
    mt.build(model, [tiny_batch([8] * 20)], path, embedder="projection")
    folder = path / "transformers"
    mixing, projection = (np.load(folder / f"embedder-{name}.npy") for name in ("mixing", "projection"))
    profile = json.loads((folder / "profile.json").read_text())
    if harm == "narrow":
        np.save(folder / "embedder-mixing.npy", mixing[:, :8])
    elif harm == "nan":
        np.save(folder / "embedder-mixing.npy", mixing * np.nan)
    elif harm == "other size":
        np.save(folder / "embedder-projection.npy", projection[:, :16])
    elif harm == "layers":
        profile["layers"][1]["layer"] = 99
    elif harm == "lengths":
        profile["layers"][1]["distances"].append(0.1)
    else:
        profile["layers"][0]["distances"][0] = -1.0
    (folder / "profile.json").write_text(json.dumps(profile))
    with pytest.raises(mt.StoreMismatchError), mt.memoize(model, path):
        pass


def test_bucket_folders_are_told_by_their_names_and_checked_against_them(path: Path) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([8] * 2, padded=8), tiny_batch([12] * 2)], path, buckets=(8, 16), profile=False)
    (path / "L=x").mkdir()
    (path / "L=8.bak").mkdir()
    (path / "transformers").mkdir()
    with mt.memoize(model, path, threshold=ITSELF, layers="all") as memo:
        logits(model, tiny_batch([8] * 2, padded=8))
    assert hits(memo) == [2, 2]
    (path / "L=8").rename(path / "L=32")
    with (
        pytest.raises(mt.StoreMismatchError, match=r"L=32 holds records of L = 8"),
        mt.memoize(model, path, threshold=1.0, layers="all"),
    ):
        pass


def test_evaluate_counts_classes_only_where_there_are_classes(path: Path) -> None:
    model = tiny_model(num_labels=1)
    batch = {**tiny_batch([8] * 20), "labels": torch.rand(20)}
    mt.build(model, [batch], path)
    report = mt.evaluate(model, [batch], path, levels=["moderate"], layers="all", repeats=1)
    assert [(row["accuracy"], row["agreement"]) for row in report.rows] == [(None, None)] * 4
    with pytest.raises(mt.InvalidBatchError, match="at most 16"):
        mt.evaluate(model, [tiny_batch([20], padded=20)], path, layers="all")


def test_numbers_of_numpy_and_tolerances_beyond_all_records_are_taken(path: Path) -> None:
    import numpy as np

    model, batch = built(path)
    with mt.memoize(
        model, path, threshold=np.float32(ITSELF), layers=np.arange(2), length_tolerance=np.int64(10**9)
    ) as memo:
        logits(model, batch)
    assert hits(memo) == [3, 3]
    for wrong in ({"level": ["moderate"]}, {"threshold": "1"}, {"lookup": "row"}):
        arguments: dict[str, Any] = {"threshold": 1.0, "layers": "all", **wrong}
        with pytest.raises(ValueError, match="expected"), mt.memoize(model, path, **arguments):
            pass


def test_another_default_dtype_changes_nothing(path: Path) -> None:
    model, batch = built(path)
    plain = logits(model, batch)
    torch.set_default_dtype(torch.float64)
    try:
        with mt.memoize(model, path, threshold=ITSELF, layers="all", length_tolerance=1) as memo:
            found = logits(model, batch)
    finally:
        torch.set_default_dtype(torch.float32)
    assert hits(memo) == [3, 3]
    assert torch.allclose(found, plain, atol=1e-4)


def test_what_is_missing_is_told_from_what_does_not_fit(path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"expected no dtype: .* store_dtype="):
        mt.build(model, [tiny_batch([8] * 20)], path, dtype="float16")
    assert not path.exists()
    with pytest.raises(memodb.StoreNotFoundError, match=r"holds no memo store: memodb_transformers\.build makes one"):
        mt.evaluate(model, [tiny_batch([8])], path)
    mt.build(model, [tiny_batch([8] * 20)], path)
    longer = tiny_batch([PADDED + 4], padded=PADDED + 4)
    for call in (mt.profile, mt.tune):
        with pytest.raises(mt.InvalidBatchError, match="found no batches at all"):
            call(model, [], path)
        with pytest.raises(mt.InvalidBatchError, match="found only longer ones"):
            call(model, [longer], path)
    with pytest.raises(ValueError, match=r"expected kinds out of plain, .* found none"):
        mt.evaluate(model, [tiny_batch([8])], path, kinds=[])


def test_a_batch_of_nothing_is_passed_over(path: Path) -> None:
    model = tiny_model()
    batch = tiny_batch([8] * 20)
    mt.build(model, [batch], path)
    tried = tiny_batch([8] * 3, seed=5)
    nothing = {name: value[:0] for name, value in tried.items()}
    assert mt.evaluate(model, [nothing, tried], path, kinds=["plain"], repeats=1).sequences == 3
