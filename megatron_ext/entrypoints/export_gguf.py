"""A Hugging Face folder, or an adapter in PEFT's format, as a GGUF file for llama.cpp, Ollama and LM Studio.

The file is written by llama.cpp's own converter (serving/converter.py): what is ours is what it is given, and what is
refused because llama.cpp would compute something else without a word. Experts in MXFP4 stay the blocks that they are.
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.declared import setting
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from megatron_ext.models.registry import Family, model_type, parse_config, read_config
from megatron_ext.parallel.plan import Site
from megatron_ext.preflight import facts
from megatron_ext.serving import converter, gguf_limits

MODEL, ADAPTER = "model.gguf", "adapter.gguf"
TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
OUTTYPES = (*TYPES.values(), "q8_0")


@dataclass
class Config:
    """The config of the phase export_gguf."""

    model: str = setting(
        "", "Hugging Face folder, as export_hf writes it", example="${phases.exported.out}", needed=True, input=True
    )
    adapter: str = setting(
        "",
        "PEFT folder (export_hf with adapter: peft) to write in place of the model, which is its base",
        example="${phases.adapter.out}",
        input=True,
    )
    outtype: str = setting(
        "", 'type of the matrices, as of the converter; "" keeps that of the files (of an adapter: f32)',
        choices=("", *OUTTYPES),
    )  # fmt: skip
    name: str = setting(
        "", 'what the file says the model is called; "" is its model_type', example="my-model", free=True
    )
    llama_cpp: str = setting(
        "", f'checkout of llama.cpp whose converters run; "" is that of the package {converter.PACKAGE}', free=True,
        example="~/llama.cpp", keyed="if_set",
    )  # fmt: skip


def check(config: Config, ranks: int, site: Site | None = None) -> list[Problem]:
    """Return what can be refused before anything runs; `site` says what is known of folders that are yet to come."""
    problems = converter.check_installed(config.llama_cpp)
    file, where = facts.model_config(config.model, site or Site(ranks), "config.json")
    family, dims, _ = parse_config(file, where) if file is not None else (None, None, [])
    if family is not None and dims is not None:
        problems += [Problem("model", said) for said in gguf_limits.refused(family, dims)]
    if ranks != 1:
        problems.append(Problem("", f"export_gguf runs on 1 rank, not {ranks}"))
    return problems


def run(config: Config, out: Path, keep: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write OUT/model.gguf, or OUT/adapter.gguf.

    Return the facts: file, bytes, outtype, converter, `differs` (what llama.cpp computes a little otherwise), and of an
    adapter lora (its settings).
    """
    problems = check(config, 1)
    family, dims, wrong = read_config(Path(config.model))
    if problems or wrong or family is None:
        raise UserMistake(problems + wrong)
    told = {"converter": converter.version(config.llama_cpp), "differs": gguf_limits.differs(family, dims)}
    file = out / (ADAPTER if config.adapter else MODEL)
    progress(0, 1, "files", file.name)
    if config.adapter:
        told |= _adapter(config, file)
    else:
        told |= _model(config, family, dims, file)
    progress(1, 1, "files", file.name)
    durable.fsync_tree(out)
    return {"file": file.name, "bytes": file.stat().st_size, **told}


def _model(config: Config, family: Family, dims: Any, file: Path) -> dict[str, Any]:
    from megatron_ext.weights import convert
    from megatron_ext.weights.hf_files import HfTensors

    tensors = HfTensors(Path(config.model))  # all are there, in files that lie in the folder
    names = tensors.shapes()
    dtype = convert.main_dtype({name: tensors.dtype(name) for name in names}, family.mapping.rules(dims, names))
    outtype = config.outtype or TYPES[dtype]
    name = config.name or model_type(family, dims)
    arguments = [config.model, "--outfile", str(file), "--outtype", outtype, f"--model-name={name}"]
    converter.convert(converter.MODEL, config.llama_cpp, arguments)
    return {"outtype": outtype, "parameters": family.config.shape(dims).parameters.total}


def _adapter(config: Config, file: Path) -> dict[str, Any]:
    from megatron_ext.serving import gguf_adapter

    with tempfile.TemporaryDirectory(dir=file.parent) as place:
        given = Path(place) / "adapter"
        lora = gguf_adapter.rewritten(Path(config.model), Path(config.adapter), given)
        outtype = config.outtype or "f32"
        arguments = [str(given), "--base", config.model, "--outfile", str(file), "--outtype", outtype]
        converter.convert(converter.ADAPTER, config.llama_cpp, arguments)
    return {"outtype": outtype, "lora": {"rank": lora.rank, "alpha": lora.alpha, "targets": lora.targets}}


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
