"""null in a pipeline file, or of an override, takes a block of settings away: as if nobody had written it."""

import dataclasses

import pytest

from jobs.kind import find_kind, kind_names
from jobs.schema.pipeline import load_pipeline
from jobs.schema.typed import without_blocks
from tests.jobs.test_pipeline import write

BLOCK = """
name: blocks
phases:
  asked:
    uses: evaluate
    with:
      model: m
      engine: {kv_gib: 3}
      mix: {entries: {a: {task: calculator, source: {synthetic_rows: 7, synthetic_seed: 2}}}}
      seen_in: store
"""


def test_null_takes_a_block_away_wherever_it_stands_and_what_may_be_null_is(tmp_path):
    path = write(tmp_path, BLOCK)
    where = ["asked.with.engine=null", "asked.with.mix.entries.a.source=null", "asked.with.seen_in=null"]
    phase = load_pipeline(path, where).phases["asked"]
    config, plain = phase.config, find_kind("evaluate").config()
    assert config.engine == plain.engine and config.mix.entries["a"].source == plain.source and config.seen_in is None
    assert phase.settings == {"model": "m", "mix": {"entries": {"a": {"task": "calculator"}}}, "seen_in": None}
    again = load_pipeline(path, [*where, "asked.with.engine.max_batch=5"]).phases["asked"].config.engine
    assert (again.max_batch, again.kv_gib) == (5, plain.engine.kv_gib)


@pytest.mark.parametrize("kind", kind_names())
def test_null_takes_every_block_list_and_mapping_away(kind):
    schema = find_kind(kind).config
    for entry in dataclasses.fields(schema):
        if entry.default_factory is not dataclasses.MISSING:
            assert without_blocks(schema, {entry.name: None}) == {}, entry.name
