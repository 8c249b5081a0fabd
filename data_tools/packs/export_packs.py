"""A pack plan in the formats of other trainers. One line or row a pack, in the order of the plan.

megatron_lm      packed.jsonl for stock Megatron-LM (`--sft --sft-tokenizer-prompt-format identity`): text that it
                 tokenizes again. Each conversation begins with an empty system message, since Megatron cuts a line
                 into conversations there and nowhere else (sft_dataset.py `_split_conversations`); then user messages
                 hold what is not trained and assistant messages what is. Every document is encoded again by
                 Megatron's rule, a message at a time, and must give its own tokens; one that does not is left out and
                 counted, or fails the export.
megatron_bridge  packed.idx.parquet for Megatron-Bridge's GPTSFTPackedParquetDataset: input_ids, loss_mask rolled by
                 one to lie on the label, seq_start_id (packed_parquet.py, packing_utils.py `fill_packing_strategy`).
"""

from pathlib import Path
from typing import Any

import numpy as np

from data_tools.base.durable import fsync_tree
from data_tools.base.inside import expanded
from data_tools.base.json_text import json_line
from data_tools.chats.tokenizer import Tokenizer, load_tokenizer
from data_tools.mistake import UserMistake
from data_tools.packs.pack import Config
from data_tools.packs.plan import PackReader
from data_tools.progress import Progress, silent

MEGATRON_LM, MEGATRON_BRIDGE = "packed.jsonl", "packed.idx.parquet"

_ROW_GROUP = 16  # packs; Bridge decodes a whole group to read one pack


def messages_of(ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Return the messages of one document, `ids` int[n] and `mask` [n]; ValueError where its text gives other
    tokens."""
    borders = np.flatnonzero(np.diff(mask.astype(np.int8))) + 1
    runs = [(int(mask[run[0]]), ids[run]) for run in np.split(np.arange(len(ids)), borders)]
    messages = [{"role": "system", "content": ""}]
    if runs[0][0]:
        messages.append({"role": "user", "content": ""})  # Megatron wants one before the assistant
    for trained, tokens in runs:
        messages.append({"role": "assistant" if trained else "user", "content": tokenizer.decode(tokens.tolist())})
    parts = [tokenizer.encode(message["content"]) for message in messages]
    if sum(parts, []) != ids.tolist() or tokenizer.encode("".join(m["content"] for m in messages)) != ids.tolist():
        raise ValueError("its text gives other tokens when it is encoded again")
    return messages


def export(config: Config, plan: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write the plan in folder `plan` beside itself, in the formats that `config` asks for. Facts by format."""
    facts: dict[str, Any] = {}
    if not config.export:
        return facts
    reader = PackReader(expanded(config.store), plan)
    if "megatron_lm" in config.export:
        tokenizer = load_tokenizer(config.tokenizer)
        facts["megatron_lm"] = to_megatron_lm(
            reader, tokenizer, plan, on_unstable=config.on_unstable, progress=progress
        )
    if "megatron_bridge" in config.export:
        facts["megatron_bridge"] = to_megatron_bridge(reader, plan, progress)
    fsync_tree(plan)
    return facts


def to_megatron_lm(
    reader: PackReader, tokenizer: Tokenizer, out: Path, on_unstable: str, progress: Progress = silent
) -> dict[str, Any]:
    """Write packed.jsonl. Facts: documents, unstable (left out), without_end (Megatron adds and trains an end there).

    Raise UserMistake naming the first document whose text is not stable, with `on_unstable` fail.
    """
    documents = unstable = without_end = 0
    with open(out / MEGATRON_LM, "w", encoding="utf-8") as file:
        for pack in range(reader.n_packs):
            line: list[dict[str, str]] = []
            for row, ids, mask in reader.documents(pack):
                try:
                    line += messages_of(ids, mask, tokenizer)
                except ValueError as error:
                    if on_unstable == "fail":
                        where = f"document {row} (source {reader.store.sources[row]}, line {reader.store.lines[row]})"
                        remedy = "set on_unstable: drop to leave such documents out"
                        raise UserMistake(f"{where} has no form for Megatron-LM: {error}; {remedy}") from None
                    unstable += 1
                    continue
                documents += 1
                without_end += int(ids[-1] != tokenizer.eos_id)
            if line:
                file.write(json_line({"messages": line}))
            progress(pack + 1, reader.n_packs, "packs", MEGATRON_LM)
    return {"documents": documents, "unstable": unstable, "without_end": without_end}


def to_megatron_bridge(reader: PackReader, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write packed.idx.parquet. Facts: documents."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"input_ids": pa.int32(), "loss_mask": pa.int8(), "seq_start_id": pa.int32()}
    schema = pa.schema([(name, pa.list_(kind)) for name, kind in kinds.items()])
    count = 0
    with pq.ParquetWriter(out / MEGATRON_BRIDGE, schema) as writer:
        for first in range(0, reader.n_packs, _ROW_GROUP):
            columns: dict[str, list[np.ndarray]] = {name: [] for name in kinds}
            for pack in range(first, min(first + _ROW_GROUP, reader.n_packs)):
                documents = [(ids, mask) for _, ids, mask in reader.documents(pack)]
                columns["input_ids"].append(np.concatenate([ids for ids, _ in documents]))
                columns["loss_mask"].append(np.concatenate([np.append(mask[1:], 0) for _, mask in documents]))
                columns["seq_start_id"].append(np.cumsum([0] + [len(ids) for ids, _ in documents[:-1]]))
                count += len(documents)
            arrays = [pa.array(rows, type=pa.list_(kinds[name])) for name, rows in columns.items()]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            progress(min(first + _ROW_GROUP, reader.n_packs), reader.n_packs, "packs", MEGATRON_BRIDGE)
    return {"documents": count}
