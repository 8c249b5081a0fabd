import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.base import declared
from data_tools.base.durable import write_json
from data_tools.mistake import UserMistake
from data_tools.packs.pack import Config, check, pack
from data_tools.packs.plan import PADDING_SLOT, Pack, PackReader, read_plan
from data_tools.packs.store import Provenance, Store, StoreWriter, row_text
from data_tools.records.balance import Balance, SourceBalance

PAD = 999  # no document holds it


def store_of(
    folder: Path, documents: list[tuple[int, int]], prompts: int = 10**9, sources: tuple[str, ...] = ("all",)
) -> Path:
    """Documents of (prompt tokens, answer tokens), dealt to `sources` in turn; every token of the store is different.

    Document i has prompt i % prompts.
    """
    folder.mkdir()
    writer = StoreWriter(folder)
    token = 1000
    for place, (prompt, answer) in enumerate(documents):
        ids = np.arange(token, token + prompt + answer, dtype=np.int32)
        mask = np.array([0] * prompt + [1] * answer, dtype=np.uint8)
        writer.add(ids, mask, Provenance(place % len(sources), place + 1, row_text(str(place % prompts), "")))
        token += len(ids)
    writer.close()
    write_json(folder / "balance.json", Balance(SourceBalance(name) for name in sources).to_json())
    return folder


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def pack_to(folder: Path, **values: object) -> Path:
    pack(Config(**values), make(folder))
    return folder


documents = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=40)
settings_of_plan = st.fixed_dictionaries(
    {
        "align": st.sampled_from([1, 2, 4]),
        "order": st.sampled_from(["decreasing", "shuffled"]),
        "seed": st.integers(0, 3),
    }
)


@given(documents, settings_of_plan, st.sampled_from([12, 16, 32, 128]))
def test_every_token_is_in_one_pack_once_and_a_document_sees_only_itself(
    tmp_path_factory: pytest.TempPathFactory, lengths: list, settings: dict, pack_length: int
) -> None:
    folder = tmp_path_factory.mktemp("p")
    store = Store(store_of(folder / "store", lengths))
    try:
        plan = pack_to(folder / "plan", store=str(store.folder), pack_length=pack_length, **settings)
    except UserMistake as mistake:
        assert "no document to pack" in str(mistake)
        assert min(-(-(sum(pair)) // settings["align"]) * settings["align"] for pair in lengths) > pack_length
        return
    reader = PackReader(store.folder, plan, pad_id=PAD)
    align = settings["align"]
    packs = [reader.pack(index) for index in range(reader.n_packs)]
    for got in packs:
        check_shape(got, pack_length, align)
        check_slots(got, store, align)
    fitting = [row for row in range(len(store)) if -(-len(store.ids(row)) // align) * align <= pack_length]
    assert sorted(row for got in packs for row in got.doc_ids.tolist()) == fitting
    seen = Counter(token for got in packs for token in got.ids.tolist() if token != PAD)
    assert seen == Counter(token for row in fitting for token in store.ids(row).tolist())
    targets = sum(float(got.loss_mask.sum()) for got in packs)
    assert targets == reader.facts["targets"] == sum(int(store.mask(row)[1:].sum()) for row in fitting)
    assert reader.facts["documents"] + reader.facts["overlong"] == len(store)


def check_shape(got: Pack, pack_length: int, align: int) -> None:
    """The arrays have the length of the pack, and the slots fill it up."""
    assert {len(a) for a in (got.ids, got.labels, got.loss_mask, got.positions)} == {pack_length}
    assert [got.ids.dtype, got.labels.dtype, got.loss_mask.dtype] == [np.int64, np.int64, np.float32]
    assert got.positions.dtype == np.int64 and got.cu_seqlens.dtype == np.int32
    assert got.cu_seqlens[0] == 0 and got.cu_seqlens[-1] == pack_length and (np.diff(got.cu_seqlens) > 0).all()
    assert all(boundary % align == 0 for boundary in got.cu_seqlens.tolist())
    assert len(got.cu_seqlens) - 1 - len(got.doc_ids) in (0, 1)


def check_slots(got: Pack, store: Store, align: int) -> None:
    """Each slot holds one document of the store and padding, or padding alone."""
    for slot, (start, stop) in enumerate(zip(got.cu_seqlens[:-1], got.cu_seqlens[1:])):
        assert got.positions[start:stop].tolist() == list(range(stop - start))
        row = int(got.doc_ids[slot]) if slot < len(got.doc_ids) else None
        tokens = store.ids(row).tolist() if row is not None else []
        mask = store.mask(row).tolist() if row is not None else []
        padding = int(stop - start) - len(tokens)
        assert got.ids[start:stop].tolist() == tokens + [PAD] * padding
        assert got.labels[start:stop].tolist() == tokens[1:] + [PAD] * (padding + bool(tokens))
        assert got.loss_mask[start:stop].tolist() == mask[1:] + [0.0] * (padding + bool(tokens))
        if row is not None:
            assert padding < align


def test_shuffled_packs_of_tiny_documents_mix_lengths_and_are_nearly_full(
    tmp_path: Path, synthetic_store: Callable[..., Path]
) -> None:
    store = synthetic_store(1500)
    readers = {
        order: PackReader(store, pack_to(tmp_path / order, store=str(store), pack_length=128, order=order))
        for order in ("decreasing", "shuffled")
    }
    kinds = {
        order: np.mean([len(set(reader.store.lengths[reader.pack(i).doc_ids])) for i in range(reader.n_packs)])
        for order, reader in readers.items()
    }
    assert kinds["shuffled"] > 2 * kinds["decreasing"]
    for reader in readers.values():
        assert reader.facts["tokens"] / (reader.n_packs * 128) > 0.97


@pytest.fixture
def reader(tmp_path: Path) -> PackReader:
    store = store_of(tmp_path / "store", [(3, 2)] * 23)
    return PackReader(store, pack_to(tmp_path / "plan", store=str(store), pack_length=10))


@pytest.mark.parametrize("align", [4, 24])
def test_padding_lies_in_short_slots_that_no_document_shares(tmp_path: Path, align: int) -> None:
    store = store_of(tmp_path / "store", [(5, 8), (3, 4)])
    plan = pack_to(tmp_path / "plan", store=str(store), pack_length=align * 1000, align=align)
    got = PackReader(store, plan, pad_id=PAD).pack(0)
    slots = np.diff(got.cu_seqlens)
    first = slots[:2].sum()
    assert not (slots % align).any() and slots.sum() == align * 1000 and max(slots[2:]) < PADDING_SLOT + align
    assert (got.ids[:first] != PAD).sum() == 20 and (got.ids[first:] == PAD).all() and not got.loss_mask[first:].any()
    assert len(slots) - 2 == -(-(align * 1000 - first) // max(slots))  # as few as that allows


def test_a_batch_is_a_pure_function_of_its_number(reader: PackReader) -> None:
    straight = [reader.batch(k, 5, seed=1) for k in range(12)]
    fresh = PackReader(reader.store.folder, reader.store.folder.parent / "plan")
    assert [fresh.batch(k, 5, seed=1) for k in reversed(range(12))][::-1] == straight
    assert [reader.batch(k, 5, seed=2) for k in range(12)] != straight


def test_the_stream_visits_every_pack_once_an_epoch_across_batch_borders(reader: PackReader) -> None:
    assert reader.n_packs == 12
    for size in (1, 5, 7, 30):
        stream = [i for k in range(60) for i in reader.batch(k, size, seed=0)]
        epochs = [stream[start : start + 12] for start in range(0, len(stream) - 11, 12)]
        assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    by_size = [[i for k in range(60 // size) for i in reader.batch(k, size, seed=0)] for size in (6, 3)]
    assert by_size[0] == by_size[1]


def test_a_plan_is_the_same_bytes_again_and_its_digest_names_it(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", [(3, 2), (1, 1), (4, 4)] * 9)
    values = {"store": str(store), "pack_length": 16, "order": "shuffled"}
    plans = [pack_to(tmp_path / name, **values, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    for name in ("plan.npz", "plan.json", "balance.json"):
        assert (plans[0] / name).read_bytes() == (plans[1] / name).read_bytes()
    readers = [PackReader(store, plan) for plan in plans]
    assert readers[0].digest == readers[1].digest != readers[2].digest
    assert readers[0].facts["plan"] != readers[2].facts["plan"]  # the seed shuffles, it is not only written down


def test_an_overlong_document_fails_by_source_and_line_or_is_counted(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", [(3, 2), (9, 4), (1, 1)])
    with pytest.raises(UserMistake, match="1 of 3 documents do not fit .* source 0 line 2; raise pack_length to 16"):
        pack(Config(store=str(store), pack_length=8, align=4, overlong="fail"), tmp_path)
    facts = pack(Config(store=str(store), pack_length=8, align=4), tmp_path)
    assert (facts["documents"], facts["overlong"]) == (2, 1)
    assert facts["tables"]["balance"]["columns"][-5:] == ["overlong", "tokens in", "tokens", "supervised", "masked"]


def test_wrong_values_are_told_at_once_with_the_nearest_legal_one() -> None:
    wrong = Config(pack_length=100, align=16, order="random")
    problems = {problem.where: problem.message for problem in declared.check_with(wrong, check)}
    assert problems.keys() == {"align", "order", "store"}
    assert "pack_length 100 is not a multiple of align 16; nearest pack_length 96" in problems["align"]
    assert check(Config(store="s", pack_length=96, align=16)) == []
    assert [problem.where for problem in declared.check_with(Config(store="s", align=0), check)] == ["align"]


def test_a_damaged_plan_or_another_store_is_a_mistake_that_names_it(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", [(3, 2)] * 9)
    other = store_of(tmp_path / "other", [(3, 2)] * 10)
    plan = pack_to(tmp_path / "plan", store=str(store), pack_length=16)
    with pytest.raises(UserMistake, match="made for another store"):
        PackReader(other, plan)
    arrays = plan / "plan.npz"
    data = arrays.read_bytes()
    one = np.array([0])
    np.savez(arrays, pack_ptr=np.array([0, 1]), doc_ids=one, starts=one, lengths=np.array([5]), source=one)
    with pytest.raises(UserMistake, match="plan.npz is damaged"):
        PackReader(store, plan)
    arrays.write_bytes(data[:50])
    with pytest.raises(UserMistake, match="plan.npz is damaged"):
        PackReader(store, plan)
    arrays.write_bytes(data)
    (plan / "plan.json").write_text("{}")
    with pytest.raises(UserMistake, match="plan.json is damaged"):
        PackReader(store, plan)
    with pytest.raises(UserMistake, match="no pack plan"):
        PackReader(store, tmp_path)


def test_a_plan_is_read_block_by_block_and_its_numbers_are_those_of_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path / "store", [(3, 1 + row % 5) for row in range(40)])
    folder = pack_to(tmp_path / "plan", store=str(store), pack_length=16)
    facts, plan = read_plan(folder)
    length = plan.pieces.length.astype(np.float64)
    wanted = np.add.reduceat(0.3 * length + 0.7 * length * length, plan.pack_ptr[:-1])
    for block in (1, 7, 1 << 20):
        monkeypatch.setattr("data_tools.packs.plan._BLOCK", block)
        assert plan.costs(0.3, 0.7).tobytes() == wanted.tobytes() and plan.digest() == facts["plan"]
    assert not plan.pieces.doc.flags.owndata  # it lies in the file
    facts.pop("crc32")  # as plans of before
    (folder / "plan.json").write_text(json.dumps(facts))
    assert read_plan(folder)[1].digest() == plan.digest()


def tokens_of(reader: PackReader) -> Counter[int]:
    """How often each token of the store is in a pack."""
    ids = np.concatenate([reader.pack(i).ids for i in range(reader.n_packs)])
    return Counter(ids[ids >= 1000].tolist())


@pytest.mark.parametrize("align", [1, 4])
def test_what_is_too_long_is_dropped_cut_or_split_as_its_source_says(tmp_path: Path, align: int) -> None:
    names = ("dropped", "cut", "split")
    store = Store(store_of(tmp_path / "store", [(10, 40)] * 3 + [(2, 3)] * 3, sources=names))
    policy = {"dropped": "drop", "cut": "truncate", "split": "split"}
    values = {"store": str(store.folder), "pack_length": 16, "align": align, "overlong_of": policy}
    reader = PackReader(store.folder, pack_to(tmp_path / "plan", **values), pad_id=PAD)
    cut, split = store.ids(1), store.ids(2)
    short = [token for row in (3, 4, 5) for token in store.ids(row).tolist()]
    assert tokens_of(reader) == Counter([*short, *cut[:16].tolist(), *split.tolist()])
    targets = sum(reader.pack(i).loss_mask.sum() for i in range(reader.n_packs))
    assert targets == reader.facts["targets"] == 3 * 3 + 6 + (6 + 15 + 15 + 1)  # a border of a split costs its target
    balance = {
        sheet["name"]: sheet for sheet in json.loads((tmp_path / "plan" / "balance.json").read_text())["sources"]
    }
    assert [(balance[n]["rows"], balance[n]["kept"]) for n in names] == [(2, 1), (2, 2), (2, 2)]


def test_a_cut_that_leaves_nothing_to_learn_is_no_piece(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", [(40, 10), (3, 3)])
    facts = {
        policy: pack(Config(store=str(store), pack_length=16, overlong=policy), make(tmp_path / policy))
        for policy in ("truncate", "split")
    }
    assert [facts[policy]["documents"] for policy in facts] == [1, 2]
    assert [facts[policy]["tokens"] for policy in facts] == [6, 6 + 16 + 2]


def test_documents_of_one_prompt_lie_in_different_packs_and_none_is_lost(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", [(2, 2)] * 40, prompts=7)
    reader = PackReader(store, pack_to(tmp_path / "plan", store=str(store), pack_length=40, apart=True))
    packs = [reader.pack(i).doc_ids for i in range(reader.n_packs)]
    assert all(len(set(docs % 7)) == len(docs) for docs in packs)
    assert sorted(np.concatenate(packs)) == list(range(40))
    assert reader.n_packs == 6  # the most a prompt has: what could not lie together went on, and filled the next


def test_a_blend_keeps_its_shares_in_every_prefix_and_its_sources_apart(tmp_path: Path) -> None:
    names = ("maths", "chat", "unused")
    store = store_of(tmp_path / "store", [(3, 2)] * 120, sources=names)
    weights = {"maths": 3.0, "chat": 1.0, "unused": 0.0}
    reader = PackReader(store, pack_to(tmp_path / "plan", store=str(store), pack_length=20, weights=weights))
    source = [int(reader.pack(i).doc_ids[0]) % 3 for i in range(reader.n_packs)]
    assert all(set(reader.pack(i).doc_ids % 3) == {source[i]} for i in range(reader.n_packs))
    stream = [i for k in range(40) for i in reader.batch(k, 5, seed=0)]
    maths = np.cumsum([source[i] == 0 for i in stream])
    assert (np.abs(maths - 0.75 * np.arange(1, 201)) < 1).all() and 2 not in {source[i] for i in stream}
    assert [reader.batch(k, 10, seed=0) for k in range(20)] == np.reshape(stream, (20, 10)).tolist()
    sheet = json.loads((tmp_path / "plan" / "balance.json").read_text())["sources"][2]
    assert (sheet["kept"], sheet["dropped"]) == (0, {"weight_0": 40})


def test_wrong_sources_are_told_with_the_nearest_name(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", [(3, 2)] * 6, sources=("maths", "chat"))
    with pytest.raises(UserMistake, match="(?s)overlong_of.chart: .*did you mean chat.*source chat has none"):
        pack(Config(store=str(store), overlong_of={"chart": "drop"}, weights={"maths": 1.0}), tmp_path)


def test_the_ranks_together_train_exactly_the_batch(reader: PackReader) -> None:
    for ranks in (1, 2, 4):
        shares = [reader.share(3, 8, 1, rank, ranks) for rank in range(ranks)]
        assert sorted(sum(shares, [])) == sorted(reader.batch(3, 8, 1))
        assert {len(share) for share in shares} == {8 // ranks}
