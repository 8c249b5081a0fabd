"""Whatever merges the parts of an array, or reads the files of many ranks, keeps few of them open at a time."""

import itertools
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_tools.base.one_file import NAME as PART
from data_tools.base.one_file import bundle
from data_tools.base.open_cache import OPEN_AT_ONCE
from data_tools.packs import left_out
from data_tools.packs.join import join
from data_tools.packs.store import Provenance, Store, StoreWriter, row_text
from data_tools.prepare import dolci, rejection, rejection_element, rejection_finish
from data_tools.records.balance import FILE, Balance, SourceBalance
from data_tools.records.merge_sorted import merged
from jobs.artifacts.seal import read_seal
from megatron_ext.entrypoints import generate
from megatron_ext.files import pickles
from megatron_ext.model_folders import model_folder
from megatron_ext.weights import dist_weights
from megatron_ext.weights.hf_files import HfTensors, SafetensorsFiles
from tests.data_tools.chats import template_of, write_tokenizer
from tests.launchers.test_late_starts import Run

PARTS = 2 * OPEN_AT_ONCE
OTHERS = 24  # files that may be open besides: the output, scratch, what an import reads


@pytest.fixture
def few_files() -> Iterator[None]:
    """Let this process open OPEN_AT_ONCE files more, and a few: so many numbers are free below the limit."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = set(map(int, os.listdir("/proc/self/fd")))
    free = (number for number in itertools.count() if number not in taken)
    last = next(itertools.islice(free, OPEN_AT_ONCE + OTHERS, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (last, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def folders(above: Path) -> list[Path]:
    made = [above / f"{number:04d}" for number in range(PARTS)]
    for folder in made:
        folder.mkdir(parents=True)
    return made


def write_lines(path: Path, *rows: dict) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_sheet(folder: Path, rows: int = 1, supervised: int = 0) -> None:
    sheet = SourceBalance.of_rows("a", rows)
    sheet.kept, sheet.tokens_in, sheet.tokens, sheet.supervised = rows, 2 * rows, 2 * rows, supervised
    (folder / FILE).write_text(json.dumps(Balance([sheet]).to_json()))


def write_store(folder: Path, rows: int) -> Path:
    folder.mkdir(parents=True)
    writer = StoreWriter(folder)
    for line in range(1, rows + 1):
        ids, mask = np.array([7, 8], np.int32), np.array([0, 1], np.uint8)
        writer.add(ids, mask, Provenance(0, line, row_text("p", "a")))
    writer.close()
    write_sheet(folder, rows, supervised=rows)
    return folder


def joined_stores(above: Path) -> None:
    one, all_at_once = write_store(above / "one", 1), write_store(above / "all", PARTS)
    parts = folders(above / "parts")
    for number, part in enumerate(parts):
        shutil.copytree(one, part, dirs_exist_ok=True)
        write_lines(part / left_out.FILE, {"source": 0, "line": 1, "bucket": "b", "reason": f"of {number}"})
        if number % 2:
            bundle(part)
            assert os.listdir(part) == [PART]
    for dedupe, out in ((False, above / "out"), (True, above / "deduped")):
        out.mkdir()
        join(parts, out, dedupe)
    assert Store(above / "out").digest == Store(all_at_once).digest
    assert len(Store(above / "deduped")) == 1
    listed = lines_of(above / "out" / left_out.FILE)
    assert [(each["line"], each["reason"]) for each in listed] == [(n + 1, f"of {n}") for n in range(PARTS)]


def drawn_rows(above: Path) -> None:
    parts, out = folders(above / "parts"), above / "out"
    for number, part in enumerate(parts):
        write_lines(part / dolci.ROWS, {"row": number})
        entry = (-number % PARTS, 0, 2, 0, 0)
        np.save(part / dolci.INDEX, np.array([entry], dolci.INDEX_RECORD))
        write_sheet(part)
    out.mkdir()
    dolci.draw(dolci.Config(target_rows=PARTS, shares={"reasoning": 1.0}), parts, out)
    assert [row["row"] for row in lines_of(out / dolci.SAMPLE)] == [-place % PARTS for place in range(PARTS)]


def rejected_samples(above: Path) -> None:
    parts, out = folders(above / "parts"), above / "out"
    for number, part in enumerate(parts):
        of_each = {"file": 0, "tokens": 2, "task": "", "rate": 1.0, "asked": [], "method": ""}
        rows = [{"prompt": place, "order": [0, place], "chat": {"place": place}, **of_each} for place in own(number)]
        write_lines(part / rejection_element.LEFT, *rows)
        np.save(part / rejection_element.PROMPTS, np.array(own(number), np.uint64))
        (part / rejection_element.ORIGINS).write_text('{"weights": [], "seed": []}')
        write_sheet(part, 2)
    out.mkdir()
    rejection_finish.finish(rejection.Config(), parts, out)
    assert [row["place"] for row in lines_of(out / rejection_finish.CHAT)] == list(range(2 * PARTS))


def own(number: int) -> list[int]:
    """Return the prompts of an element: every so many, as `generate` deals them."""
    return [number, number + PARTS]


def generated_samples(above: Path) -> None:
    parts, out = folders(above / "parts"), above / "out"
    for number, part in enumerate(parts):
        of_each = {"sample": 0, "correct": True, "reward": 1.0, "finish": "stop", "tokens": 1, "answer": "1"}
        rows = [{"prompt_id": place, "place": place, **of_each} for place in own(number)]
        write_lines(part / generate.SAMPLES, *rows)
    out.mkdir()
    facts = generate.finish(generate.Config(model="m"), parts, out, above / "keep")
    assert facts["samples"] == 2 * PARTS
    assert [row["place"] for row in lines_of(out / generate.SAMPLES)] == list(range(2 * PARTS))


def merged_of_merged(above: Path) -> None:
    above.mkdir()
    files = [above / f"{number}.jsonl" for number in range(PARTS)]
    for number, file in enumerate(files):
        write_lines(file, {"key": 0, "file": number}, {"key": number % 3 + 1, "file": number})
    with merged(files, lambda file: iter(lines_of(file)), lambda row: row["key"], scratch=above) as rows:
        once, again = list(rows()), list(rows())
    assert once == again == sorted(once, key=lambda row: (row["key"], row["file"])) and len(once) == 2 * PARTS
    assert not list(above.glob(".*"))  # nothing of the scratch files stays


def checkpoint(above: Path) -> None:
    pieces = []
    for rank in range(PARTS):
        writer = dist_weights.Writer(above, rank)
        writer.write(dist_weights.Region("w", (PARTS, 2), (rank, 0), (1, 2)), torch.full((1, 2), float(rank)))
        writer.close()
        pieces += writer.written
    dist_weights.finish(above, pieces)
    whole = dist_weights.Reader(above).read(dist_weights.Region("w", (PARTS, 2), (0, 0), (PARTS, 2)))
    assert whole[:, 1].tolist() == list(range(PARTS))


def legacy_ranks(above: Path) -> None:
    parts = folders(above / "ranks")
    for number, part in enumerate(parts):
        torch.save({"weight": torch.full((3,), float(number))}, part / "model_optim_rng.pt")
    loaded = [pickles.load(part / "model_optim_rng.pt")["weight"] for part in parts]  # all mapped at once
    assert [tensor.tolist() for tensor in loaded] == [[float(number)] * 3 for number in range(PARTS)]


def hugging_face_shards(above: Path) -> None:
    above.mkdir()
    names = [f"t{number:04d}" for number in range(PARTS)]
    files = SafetensorsFiles(above, dict.fromkeys(names, ("float32", (2,))), shard_bytes=8)
    for half in range(2):  # in turns, so that each file is opened twice
        for number, name in enumerate(names):
            files.write(name, torch.tensor([float(number + half)]), first=half)
    files.close()
    assert len(files.write_index()) == PARTS + 1
    tensors = HfTensors(above)
    assert all(tensors.read(name).tolist() == [number, number + 1] for number, name in enumerate(names))


MERGES: list[Callable[[Path], None]] = [
    joined_stores,
    drawn_rows,
    rejected_samples,
    generated_samples,
    merged_of_merged,
    checkpoint,
    legacy_ranks,
    hugging_face_shards,
]


@pytest.mark.parametrize("merge", MERGES, ids=lambda merge: merge.__name__)
def test_many_parts_are_merged_with_few_files_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_files: None, merge: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(model_folder, "open_folder", lambda path: SimpleNamespace(step=1))  # for `generate`'s table
    merge(tmp_path / "m")


@pytest.fixture
def at_most_256_files() -> Iterator[None]:
    """Let this process and its children open 256 files, as `ulimit -n 256` does."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.soak
def test_a_checkpoint_of_4000_files_is_read_with_256_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_most_256_files: None
) -> None:
    monkeypatch.setattr("tests.test_many_parts.PARTS", 4000)
    checkpoint(tmp_path)
    assert len(list(tmp_path.glob("*.distcp"))) == 4000


@pytest.mark.soak
def test_2000_elements_of_materialize_are_sealed_with_256_files_open(tmp_path: Path, at_most_256_files: None) -> None:
    """Of each four rows one is malformed, so that every element lists rows that it left out."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template=template_of("qwen3"))
    asked = {"role": "user", "content": "What is it?"}
    rows = [{"messages": [asked, {"role": "assistant", "content": f"It is {n // 2}."}]} for n in range(8000)]
    write_lines(tmp_path / "rows.jsonl", *(row if n % 4 else {"none": n} for n, row in enumerate(rows)))
    settings = f"tokenizer: {tokenizer}, source: {{inputs: [{tmp_path}/rows.jsonl]}}, on_bad_row: bucket"
    text = f"name: many\nphases:\n  data: {{uses: materialize, array: 2000, with: {{{settings}}}}}\n"
    (tmp_path / "late.yaml").write_text(text)
    run = Run(tmp_path)
    run.submit(1)
    for first in range(0, 2000, 200):
        tasks = [run.start("data", *range(begin, begin + 100)) for begin in (first, first + 100)]
        for task in tasks:
            task.join()
            assert task.exitcode == 0
    seal = read_seal(run.artifact("data").seal_path)
    assert seal is not None and seal.parts is not None and len(seal.parts) == 2000
    assert seal.facts["lines"] == 8000 and seal.facts["kept"] + sum(seal.facts["buckets"].values()) == 8000
    assert len(lines_of(seal.folder / left_out.FILE)) == 8000 - seal.facts["kept"]
    print({name: seal.facts[name] for name in ("kept", "buckets")})
