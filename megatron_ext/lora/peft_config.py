"""adapter_config.json, read: every key is carried, is known to change nothing at its value, or is refused by name.

PEFT writes all fields of its LoraConfig, and newer versions have newer ones; a field that is read over may mean another
function of the same tensors (PiSSA and its kin change the base model, aLoRA acts on some tokens only). No torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from data_tools.base import durable
from data_tools.base.inside import inside
from data_tools.mistake import Problem, UserMistake
from megatron_ext.lora.settings import ALL_LINEAR, BARE, NOT_IN_ALL, LoraConfig

PEFT_CONFIG = "adapter_config.json"
CARRIED = (
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules",
    "layers_to_transform", "layers_pattern",
)  # fmt: skip
WITHOUT_EFFECT = {  # names, and settings of what is refused below
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config",
}  # fmt: skip
ONLY: Mapping[str, tuple[Any, ...]] = {  # the values that change nothing, beside null
    "task_type": ("CAUSAL_LM",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # how factors began; others begin by changing W
    "bias": ("none",),
    **dict.fromkeys(
        ("fan_in_fan_out", "use_rslora", "use_dora", "use_qalora", "lora_bias", "ensure_weight_tying"), (False,)
    ),
    **dict.fromkeys(
        (
            "modules_to_save", "rank_pattern", "alpha_pattern", "loftq_config", "layer_replication",
            "trainable_token_indices", "alora_invocation_tokens", "megatron_config", "eva_config", "corda_config",
            "lora_ga_config", "velora_config", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config",
        ),
        ({}, []),
    ),
}  # fmt: skip
MATCH_S = 1.0  # an expression of a stranger's may take on one name

Names = str | Sequence[str]  # an expression, or the ends of names


@dataclass(frozen=True)
class PeftAdapter:
    """The settings of a PEFT folder. `config` has what our LoraConfig has; its targets come with the model."""

    where: str
    config: LoraConfig
    modules: Names
    parameters: tuple[str, ...] = ()
    excluded: Names = ()
    layers: tuple[int, ...] | None = None
    layers_patterns: tuple[str, ...] = ()

    def reaches(self, name: str, target: str) -> bool:
        """Return whether PEFT adapts the parameter `name` of the model, whose target is called `target`.

        (peft/tuners/tuners_utils.py, `check_target_module_exists` and `_inject_parameters`, peft 0.21.)
        """
        if _ends(name, self.parameters):
            return True
        module = name.removesuffix(".weight")
        if target in BARE:
            return False
        if self._matches(self.excluded, module):
            return False
        if self.modules == ALL_LINEAR:
            return target not in NOT_IN_ALL
        if not self._matches(self.modules, module):
            return False
        if self.layers is None or isinstance(self.modules, str) or module in self.modules:
            return True
        number = self._layer(module)
        return number is not None and number in self.layers

    def _matches(self, names: Names, module: str) -> bool:
        return self._match(names, module) is not None if isinstance(names, str) else _ends(module, names)

    def _layer(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\..*" for pattern in self.layers_patterns]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\..*"]:
            if match := self._match(pattern, module):
                return int(match["idx"])
        return None

    def _match(self, pattern: str, module: str) -> regex.Match | None:
        """Match a whole name. Raise UserMistake for an expression that is none, or that takes too long."""
        try:
            return regex.fullmatch(pattern, module, timeout=MATCH_S) if pattern else None
        except (regex.error, TimeoutError, RecursionError, MemoryError) as error:
            said = f"the expression {pattern[:80]!r} cannot be used ({error or 'it takes too long'})"
            raise UserMistake(Problem(self.where, f"{said}: name the modules instead")) from None


def _ends(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def read(folder: Path) -> tuple[PeftAdapter | None, list[Problem]]:
    """Return the settings of a PEFT folder, or why we have no such adapter."""
    where = str(Path(folder) / PEFT_CONFIG)
    try:
        path = inside(folder, PEFT_CONFIG)
        if path is None:
            raise FileNotFoundError("there is no such file")
        settings = durable.read_json(path)
    except UserMistake as mistake:
        return None, [Problem(str(folder), f"no PEFT folder ({problem})") for problem in mistake.problems]
    except (OSError, ValueError, RecursionError) as error:
        return None, [Problem(str(folder), f"no PEFT folder ({PEFT_CONFIG}: {error})")]
    if not isinstance(settings, dict):
        return None, [Problem(where, "is no JSON object")]
    if settings.get("peft_type") != "LORA":
        return None, [Problem(where, f"peft_type {settings.get('peft_type')!r} is none that we have: only LORA")]
    problems = [Problem(where, message) for message in (*_unknown(settings), *_mistyped(settings))]
    return (None, problems) if problems else (_adapter(settings, where), [])


def _unknown(settings: Mapping[str, Any]) -> list[str]:
    """Return why keys are not understood."""
    messages = []
    for key, value in settings.items():
        if value is None or key in CARRIED or key in WITHOUT_EFFECT:
            continue
        if key not in ONLY:
            remedy = "merge the adapter with PEFT first, or remove the key if the adapter does not depend on it"
            messages.append(f"{key} = {value!r} is not known: {remedy}")
        elif not any(value == only and type(value) is type(only) for only in ONLY[key]):
            messages.append(f"{key} {value!r} is not understood: merge the adapter with PEFT first")
    return messages


def _mistyped(settings: Mapping[str, Any]) -> list[str]:
    """Return which carried keys have values of another type."""
    wrong = {key: settings.get(key) for key, is_right in _RIGHT.items() if not is_right(settings.get(key))}
    return [f"{key} is {value!r}, no value that PEFT has" for key, value in wrong.items()]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value == value and abs(value) < 1e6


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _are_names(value: Any) -> bool:
    return value is None or isinstance(value, str) or _are_texts(value)


def _are_layers(value: Any) -> bool:
    return value is None or all(type(layer) is int and layer >= 0 for layer in _listed(value))


_RIGHT: Mapping[str, Callable[[Any], bool]] = {  # of carried keys: whether a value is one that PEFT has
    "r": lambda value: type(value) is int and 0 < value < 1 << 20,
    "lora_alpha": _is_number,
    "lora_dropout": lambda value: value is None or _is_number(value),
    "target_modules": _are_names,
    "exclude_modules": _are_names,
    "target_parameters": lambda value: value is None or _are_texts(value),
    "layers_pattern": _are_names,
    "layers_to_transform": _are_layers,
}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _adapter(settings: Mapping[str, Any], where: str) -> PeftAdapter:
    modules, layers = settings.get("target_modules") or [], settings.get("layers_to_transform")
    if isinstance(modules, str) and modules.lower() == ALL_LINEAR:
        modules = ALL_LINEAR
    return PeftAdapter(
        where=where,
        config=LoraConfig(
            rank=settings["r"],
            alpha=float(settings["lora_alpha"]),
            dropout=float(settings.get("lora_dropout") or 0),
            targets=[],
        ),
        modules=modules if isinstance(modules, str) else tuple(modules),
        parameters=tuple(settings.get("target_parameters") or ()),
        excluded=settings.get("exclude_modules") or (),
        layers=None if layers in (None, []) else tuple(_listed(layers)),
        layers_patterns=tuple(_listed(settings["layers_pattern"])) if settings.get("layers_pattern") else (),
    )
