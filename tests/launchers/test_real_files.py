"""Real conversations, real tokenizers and stock chat templates, as arrays of a real Slurm, to 262,144-token packs."""

import json

import numpy as np
import pytest
import yaml

from data_tools.base.durable import read_json
from data_tools.packs.plan import PackReader
from data_tools.packs.store import Store
from data_tools.records.balance import Balance
from jobs.artifacts.seal import read_seal
from tests.command import afterok, afterok_json
from tests.data_tools.chats import TEMPLATES, tokenizer_of
from tests.data_tools.test_materialize_chats import FAMILIES, FILES

LENGTH, ALIGN, ELEMENTS = 262_144, 8, 3


def phases_of(name, tokenizer, inputs):
    chat = {"template": str(TEMPLATES / f"{name}.jinja"), "arguments": {"bos_token": ""} if name == "llama3" else {}}
    return {
        name: {"uses": "materialize", "array": ELEMENTS, "with": {
            "tokenizer": str(tokenizer), "source": {"inputs": inputs}, "chat": chat, "on_bad_row": "bucket"}},
        f"{name}_packs": {"uses": "pack", "with": {
            "store": f"${{phases.{name}.out}}", "pack_length": LENGTH, "align": ALIGN}},
    }  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize("tokenizer_name", ["qwen3_rebuilt", "gpt2_rebuilt"])
def test_every_row_of_the_shared_files_is_in_a_pack_or_in_a_bucket(tmp_path, dev_cluster, inputs, tokenizer_name):
    files, lines = [str(inputs.data(file)) for file in FILES], list(map(inputs.lines, FILES))
    tokenizer = tokenizer_of(inputs, tmp_path / "tokenizer", tokenizer_name)
    pipeline, run, env = tmp_path / "real.yaml", tmp_path / "run", dev_cluster.env()
    phases = {key: phase for name in FAMILIES for key, phase in phases_of(name, tokenizer, files).items()}
    pipeline.write_text(yaml.safe_dump({"name": "real", "phases": phases}, sort_keys=False))
    afterok("run", pipeline, "--run", run, env=env, timeout=1500)
    facts = {phase["phase"]: phase["facts"] for phase in afterok_json("status", run, env=env)["phases"]}
    for name in FAMILIES:
        store_path, packs_path = (
            read_seal(next(run.glob(f"{phase}/*/seal.json"))).folder for phase in (name, f"{name}_packs")
        )
        store, reader = Store(store_path), PackReader(store_path, packs_path)
        sheets = Balance.from_json(read_json(store_path / "balance.json")).sources
        assert [sheet.lines for sheet in sheets] == lines
        assert len(store) + sum(facts[name]["buckets"].values()) == sum(lines)
        placed = []
        for number in range(reader.n_packs):
            pack = reader.pack(number)
            assert len(pack.ids) == LENGTH and not (pack.cu_seqlens % ALIGN).any()
            for row, ids, mask in reader.documents(number):
                assert np.array_equal(ids, store.ids(row)) and np.array_equal(mask, store.mask(row))
                placed.append(row)
        assert sorted(placed) == list(range(len(store)))
        print(
            tokenizer_name,
            name,
            json.dumps(facts[name]["buckets"]),
            f"{len(store):,} rows, {store.tokens:,} tokens,",
            f"{reader.n_packs} packs",
        )
