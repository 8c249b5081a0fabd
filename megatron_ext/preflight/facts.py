"""What is known of a training before it queues: its model, its packs, its GPUs.

Model and packs may still have to be made by phases upstream. What those will hold is forecast: by import_hf the
config.json of its source, by pack the length and alignment of packs. What nobody knows yet is not asked.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy

from data_tools.base import durable
from data_tools.base.inside import inside
from data_tools.chats.char_tokenizer import characters_of
from data_tools.chats.tokenizer import has_template
from data_tools.mistake import Problem, UserMistake
from data_tools.tasks.messages import told_texts
from data_tools.tasks.mix import MixConfig
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.models.registry import parse_config
from megatron_ext.parallel import rules
from megatron_ext.parallel.calibration import GIB, GPUS, Gpu
from megatron_ext.parallel.machine import PINNED, Machine, installed
from megatron_ext.parallel.parts import OURS, TE, TORCH, Parts, choose
from megatron_ext.parallel.plan import ParallelPlan, Site, Workload
from megatron_ext.parallel.settings import ModelSettings
from megatron_ext.parallel.shape import ModelShape


@dataclass(frozen=True)
class Documents:
    """The documents of an average pack: sums of tokens, squared tokens, and pairs (query, key) within the window."""

    tokens: float
    squares: float
    window_pairs: float
    known: bool = True  # False: assumed to be one document as long as the pack

    @classmethod
    def of(cls, lengths: numpy.ndarray, packs: int, window: int) -> "Documents":
        """Sum up the documents of all packs; `lengths` int[documents] in tokens."""
        lengths = lengths.astype(numpy.float64)
        inside = numpy.minimum(lengths, window) if window else lengths
        pairs = inside * lengths - inside * inside / 2
        tokens, squares, window_pairs = (float(total.sum()) / packs for total in (lengths, lengths**2, pairs))
        return cls(tokens, squares, window_pairs)

    @classmethod
    def one(cls, pack_length: int, window: int) -> "Documents":
        """Assume one document as long as the pack."""
        return replace(cls.of(numpy.array([pack_length]), 1, window), known=False)


@dataclass(frozen=True)
class Training:
    """A workload, and what its costs (but not its legality) depend on."""

    workload: Workload  # with shape, pack_length and global_batch
    documents: Documents
    supervised: float = 1.0  # share of tokens that reach the output layer
    dtype: str = "bfloat16"  # of the weights
    gpu: Gpu | None = None
    memory_gib: float | None = None  # of a GPU, where the profile says so
    gpus_per_node: int = 8
    offload: float = 0.0  # share of the optimizer's state in host memory
    lora: LoraConfig = field(default_factory=LoraConfig)  # rank 0: all parameters are trained
    muon: bool = False  # in AdamW's place, of matrices between the layers
    assumed: tuple[str, ...] = ()  # of the machines, in sentences

    @property
    def shape(self) -> ModelShape | None:
        """The model's shape, None while its config.json is not known."""
        return self.workload.shape

    @property
    def known_shape(self) -> ModelShape:
        """The model's shape; raises ValueError while its config.json is not known."""
        if self.workload.shape is None:
            raise ValueError("the model's config.json is not known yet")
        return self.workload.shape

    @property
    def pack_length(self) -> int:
        """Tokens of a pack; raises ValueError while it is not known."""
        if self.workload.pack_length is None:
            raise ValueError("the pack length is not known yet")
        return self.workload.pack_length

    @property
    def speed(self) -> Gpu:
        """The GPU's data sheet; raises ValueError where the type of GPU is not known."""
        if self.gpu is None:
            raise ValueError("the type of GPU is not known")
        return self.gpu

    @property
    def capacity(self) -> float | None:
        """Bytes of a GPU's memory; None where neither profile nor type tell them."""
        gib = self.memory_gib or (self.gpu.memory_gib if self.gpu else None)
        return gib * GIB if gib else None


def model_config(folder: str, site: Site, file: str = "hf/config.json") -> tuple[dict[str, Any] | None, str]:
    """Return (config.json of a model folder, where it is); of a Hugging Face folder it is the `file` config.json.

    It is the file, or what its phase will write; None where neither is known.
    """
    path = Path(folder) / file
    try:
        return durable.read_json(inside(Path(folder), file)), str(path)
    except (OSError, ValueError, UserMistake):
        return site.forecasts.get(folder, {}).get("hf_config"), str(path)


def model_template(folder: str, site: Site) -> bool | None:
    """Return whether the tokenizer of a model folder has a chat template, or will have one; None: not known."""
    known = has_template(Path(folder) / "hf")
    return site.forecasts.get(folder, {}).get("chat_template") if known is None else known


def remarks(mix: MixConfig, model: str, site: Site) -> list[str]:
    """Say which prompts of a mix pass the chat template of a model folder by."""
    return told_texts(mix, model_template(model, site), model)


def model_characters(folder: str, site: Site) -> str | None:
    """Return the characters that the tokenizer of a model folder knows, or will know, where it knows no others."""
    return characters_of(Path(folder) / "hf") or site.forecasts.get(folder, {}).get("characters")


def model_adapter(folder: str, site: Site) -> tuple[bool, LoraConfig | None]:
    """Return (whether anything is known of a model folder, the adapter that it has or will have)."""
    try:
        facts = durable.read_json(inside(Path(folder), "model.json"))
    except (OSError, ValueError, UserMistake):
        facts = site.forecasts.get(folder, {})
    adapter = facts.get("adapter")
    return bool(facts), LoraConfig(**adapter["lora"]) if adapter else None


def forecast(model: str, lora: LoraConfig, site: Site) -> dict[str, Any]:
    """Return what the model folder of a training on the model folder `model` will hold."""
    adapter = {"adapter": {"lora": asdict(lora)}} if lora.rank else {}
    known = {"hf_config": model_config(model, site)[0], "chat_template": model_template(model, site)}
    return {**known, "characters": model_characters(model, site), **adapter}


def forward(config: ModelSettings, site: Site) -> Training:
    """Return what a phase that trains nothing carries."""
    return prepare(config, "", global_batch=1, site=site)[0]


def check_forward(config: ModelSettings, site: Site) -> list[Problem]:
    """Return what can be refused of the parallel plan and the layers of a phase that trains nothing."""
    training = forward(config, site)
    return rules.check_forward(config.parallel, replace(training.workload, pack_length=None, global_batch=None))


def pack_facts(folder: str, site: Site) -> dict[str, Any]:
    """Return plan.json of a pack output, or what pack will write of it."""
    try:
        return durable.read_json(Path(folder) / "plan.json")
    except (OSError, ValueError):
        return dict(site.forecasts.get(folder, {}))


def _lengths(folder: str) -> Any:
    """Return the tokens of each packed document, int array; None where the plan is not there yet."""
    from data_tools.packs.plan import read_plan

    try:
        return read_plan(Path(folder))[1].pieces.length
    except UserMistake:
        return None


def planned_machine(backend: str, site: Site) -> tuple[Machine | None, list[str]]:
    """Return the machine that plan takes a phase to run on, and what is assumed of it; None where nothing is known.

    The GPUs are the profile's; the packages those that are installed where plan runs. `backend: te` says that
    Transformer Engine is there.
    """
    if site.gpus_per_node is None:
        return None, []
    found, gpu = installed(), GPUS.get(site.gpu)
    if not site.gpus_per_node:
        return found, []
    machine = replace(found, gpu=site.gpu or "a GPU", capability=gpu.capability if gpu else None)
    assumed = [] if gpu else ["the type of GPU is not known: taken for an H100"]
    if backend == TE and not machine.transformer_engine:
        machine = replace(machine, transformer_engine=PINNED.transformer_engine)
        assumed.append(f"{machine.packages[0]} is not installed here, and taken to be there")
    assumed.append(f"nodes have the packages that are installed here: {', '.join(found.packages) or 'none of these'}")
    return machine, assumed


def parts_of(plan: ParallelPlan, w: Workload) -> Parts | None:
    """Return whose layers a phase will be made of; None while that is not known."""
    if w.machine is None:
        return None if w.backend != TORCH and installed().transformer_engine else OURS
    return choose(w.backend, rules.needs_of(plan, w)).parts


def prepare(settings: ModelSettings, packs: str, global_batch: int, site: Site) -> tuple[Training, list[Problem]]:
    """Return what a training with these settings on the pack plan `packs` would carry, as far as it is known.

    The problems are those of the model's config.json.
    """
    model, dtype, backend = settings.model, settings.dtype, settings.backend
    shape: ModelShape | None = None
    problems: list[Problem] = []
    config, where = model_config(model, site) if model else (None, "")
    if config is not None:
        family, dims, problems = parse_config(config, where)
        if family is not None and dims is not None:
            shape, dtype = family.config.shape(dims), dtype or dims.dtype
    facts = pack_facts(packs, site) if packs else {}
    length = facts.get("pack_length")
    machine, assumed = planned_machine(backend, site)
    workload = Workload(
        site.ranks,
        shape,
        pack_length=length,
        align=facts.get("align"),
        global_batch=global_batch,
        backend=backend,
        machine=machine,
        dtype=dtype,
        base=settings.base,
        gpus=None if site.gpus_per_node is None else site.gpus_per_node > 0,
    )
    lengths = _lengths(packs) if shape and length else None
    window = shape.window if shape else 0
    if lengths is None or length is None:
        documents, supervised = Documents.one(length or 1, window), 1.0
    else:
        documents = Documents.of(lengths, facts["packs"], window)
        workload = replace(workload, longest=int(lengths.max()))
        supervised = facts["targets"] / (facts["packs"] * length)
    training = Training(
        workload,
        documents,
        supervised,
        dtype or "bfloat16",
        gpu=GPUS.get(site.gpu),
        memory_gib=site.gpu_mem_gib,
        gpus_per_node=max(site.ranks // site.nodes, 1),
        assumed=tuple(assumed),
    )
    return training, problems
