import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.mistake import UserMistake
from data_tools.packs.store import Provenance, Store, StoreWriter, row_text, text_hash

rows_of_tokens = st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 1)), min_size=1), max_size=20)


def write(folder: Path, rows: list[list[tuple[int, int]]]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    writer = StoreWriter(folder)
    for place, row in enumerate(rows):
        ids, mask = np.array(row, dtype=np.int64).T
        writer.add(
            ids.astype(np.int32), mask.astype(np.uint8), Provenance(place % 2, place + 1, row_text(f"p{place}", "a"))
        )
    writer.close()
    return folder


@given(rows_of_tokens)
def test_what_was_added_is_read_back(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    store = Store(write(tmp_path_factory.mktemp("store") / "s", rows))
    assert len(store) == len(rows)
    assert store.lengths.tolist() == [len(row) for row in rows]
    assert [list(zip(store.ids(i).tolist(), store.mask(i).tolist())) for i in range(len(rows))] == rows
    assert store.lines.tolist() == [place + 1 for place in range(len(rows))]
    assert [tuple(words) for words in store.prompt_hashes.tolist()] == [text_hash(f"p{i}") for i in range(len(rows))]
    assert store.facts["tokens"] == sum(map(len, rows)) == store.tokens
    assert store.facts["supervised"] == sum(mask for row in rows for _, mask in row)
    assert not (store.folder / ".rows.spool").exists()


def test_the_digest_names_the_content(tmp_path: Path) -> None:
    first = Store(write(tmp_path / "a", [[(1, 0), (2, 1)], [(3, 1)]]))
    assert Store(write(tmp_path / "b", [[(1, 0), (2, 1)], [(3, 1)]])).digest == first.digest
    for other in ([[(1, 0), (2, 1)], [(4, 1)]], [[(1, 0)], [(2, 1), (3, 1)]], [[(1, 1), (2, 1)], [(3, 1)]]):
        assert Store(write(tmp_path / "c", other)).digest != first.digest


def test_hashes_tell_prompt_from_answer() -> None:
    assert row_text("1+1=", "2").row_hash != row_text("1+1", "=2").row_hash != row_text("1+1=2", "").row_hash
    assert text_hash("\ud800") == text_hash("\ud800")


def test_megatron_core_reads_the_store(tmp_path: Path) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    rows = [[(7, 0), (70_000, 1), (3, 1)], [(5, 1)], [(2**31 - 1, 0)] * 9]
    folder = write(tmp_path / "s", rows)
    tokens = indexed_dataset.IndexedDataset(str(folder / "tokens"), mmap=True)
    mask = indexed_dataset.IndexedDataset(str(folder / "tokens_loss_mask"), mmap=True)
    assert len(tokens) == len(mask) == len(rows)
    assert [list(zip(tokens[i].tolist(), mask[i].tolist())) for i in range(len(rows))] == rows
    assert tokens.document_indices.tolist() == [0, 1, 2, 3]
    assert (tokens[0].dtype, mask[0].dtype) == (np.int32, np.uint8)


FILES = ["tokens.bin", "tokens.idx", "tokens_loss_mask.bin", "tokens_loss_mask.idx", "rows.npz", "store.json"]


DAMAGES = [(name, damage) for name in FILES for damage in ("missing", "empty", "cut", "grown", "scribbled")]
DAMAGES.remove(("rows.npz", "grown"))  # zip archives allow it, and every value is still the one written
for _bin in ("tokens.bin", "tokens_loss_mask.bin"):
    DAMAGES.remove((_bin, "scribbled"))  # a changed token is the seal's to find: no reader rehashes gigabytes


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_store_is_a_mistake_that_names_the_file(tmp_path: Path, name: str, damage: str) -> None:
    folder = write(tmp_path / "s", [[(1, 0), (2, 1)], [(3, 1)]])
    path = folder / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "scribbled":
        path.write_bytes(b"\xff" * 40 + data[40:])
    else:
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "grown": data + b"}"}[damage])
    with pytest.raises(UserMistake) as caught:
        Store(folder)
    assert name in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_no_byte_of_the_directory_of_rows_npz_gives_other_values_or_another_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", [[(1, 0)]])
    path, wanted = folder / "rows.npz", Store(folder).records(0, 1).tobytes()
    data = path.read_bytes()
    for place in range(data.index(b"PK\x01\x02"), len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x81]) + data[place + 1 :])
        try:
            assert Store(folder).records(0, 1).tobytes() == wanted
        except UserMistake as mistake:
            assert str(path) in str(mistake)


def test_a_file_of_another_store_is_a_mistake_that_names_it(tmp_path: Path) -> None:
    other = write(tmp_path / "other", [[(1, 0)], [(2, 1)], [(3, 1)]])
    for name in ("tokens.idx", "tokens_loss_mask.idx", "rows.npz"):
        folder = write(tmp_path / "s", [[(1, 0), (2, 1)], [(3, 1)]])
        shutil.copy(other / name, folder / name)
        with pytest.raises(UserMistake, match=name):
            Store(folder)


def test_a_folder_that_never_closed_is_no_store(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    writer.add(np.array([1], dtype=np.int32), np.array([1], dtype=np.uint8), Provenance(0, 1, row_text("p", "a")))
    with pytest.raises(UserMistake, match="no token store"):
        Store(tmp_path)
    writer.close()
    assert len(Store(tmp_path)) == 1


def test_a_row_of_unequal_ids_and_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 ids and 1 mask"):
        StoreWriter(tmp_path).add(np.zeros(2, np.int32), np.zeros(1, np.uint8), Provenance(0, 1, row_text("p", "a")))


def test_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[(token, 1)] * (1 + token % 3) for token in range(50)]
    whole = Store(write(tmp_path / "a", rows))
    monkeypatch.setattr("data_tools.packs.store._BATCH", 7)
    assert Store(write(tmp_path / "b", rows)).digest == whole.digest


def test_a_wrong_byte_of_a_column_is_found_out_when_that_column_is_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", [[(1, 0)]] * 2000)
    data = bytearray((folder / "rows.npz").read_bytes())
    data[data.index(b"line.npy") + 200] ^= 1
    (folder / "rows.npz").write_bytes(bytes(data))
    store = Store(folder)
    assert store.ids(3).tolist() == [1] and store.sources.tolist() == [0, 1] * 1000
    for ask in (lambda: store.lines, lambda: store.records(0, 2)):
        with pytest.raises(UserMistake, match="rows.npz is damaged.*line"):
            ask()


def test_a_store_that_was_closed_maps_its_files_anew(tmp_path: Path) -> None:
    store = Store(write(tmp_path / "s", [[(1, 0), (2, 1)], [(3, 1)]]))
    before = store.ids(0).tolist(), store.lines.tolist(), store.records(0, 2).tobytes()
    fds = len(os.listdir("/proc/self/fd"))
    store.close()
    assert len(os.listdir("/proc/self/fd")) < fds
    assert (store.ids(0).tolist(), store.lines.tolist(), store.records(0, 2).tobytes()) == before


def test_the_rows_of_a_store_are_mapped_not_read(tmp_path: Path) -> None:
    """What is private to a process does not grow with the rows: all arrays are views of mapped files."""
    store = Store(write(tmp_path / "s", [[(1, 0), (2, 1)], [(3, 1)]]))
    arrays = [store.lengths, store.offsets, store.all_ids, store.all_masks, store.sources, store.lines, store.turns]
    for array in (*arrays, store.prompt_hashes, store.row_hashes):
        assert not array.flags.owndata and not array.flags.writeable
