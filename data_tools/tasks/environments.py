"""Megatron-LM's YAML files of environments for reinforcement learning, as the settings of a mix that they stand for."""

import re
from pathlib import Path
from typing import Any, TypedDict

import yaml

from data_tools.base.yaml_loaders import read_file, read_values
from data_tools.mistake import Problem, UserMistake, nearest

_AGENTS = {"DAPOAgent": "dapo_math", "AIMEAgent": "aime", "GSM8KAgent": "gsm8k"}
_ARGUMENTS = ("format_reward", "answer_format", "chat_mode")
_WITHOUT_COUNTERPART = {  # argument → the one value that asks for nothing
    "negative_reward": 0.0, "partial_end_reward": 0.0, "assistant_suffix": "Assistant: "}  # fmt: skip
_LARGEST = 1e12  # of a weight or a reward
# Megatron-LM's own: in another's module an agent of the same name may be any.
_MODULE = re.compile(r"|examples\.rl\.environments\.math\.(?:dapo|aime|gsm8k)_agent")
_ENVIRONMENT_KEYS = ("agent_type", "agent_args", "weight", "evaluation_only")


class Environment(TypedDict):
    """Holds the settings of mix.Entry that an environment has."""

    task: str
    options: dict[str, Any]
    weight: float
    rewards: dict[str, float]
    evaluation_only: bool


def read_environments(path: Path) -> dict[str, Environment]:
    """Return the environments of a file such as examples/rl/environment_configs/dapo.yaml, named by their tasks.

    Their prompts come from the hub. Raise UserMistake for everything that has no counterpart here.
    """
    try:
        given = read_values(read_file(path))
    except OSError as error:
        raise UserMistake(Problem(str(path), error.strerror or str(error))) from None
    except yaml.YAMLError as error:
        raise UserMistake(Problem(str(path), f"not YAML: {' '.join(str(error).split())}")) from None
    if not isinstance(given, list) or not given:
        raise UserMistake(Problem(str(path), "no list of environments; each has agent_type, agent_args, weight"))
    environments: dict[str, Environment] = {}
    problems: list[Problem] = []
    for number, value in enumerate(given, 1):
        where = f"{path}: environment {number}"
        environment = _environment(value)
        if isinstance(environment, str):
            problems.append(Problem(where, environment))
        elif environment["task"] in environments:
            problems.append(Problem(where, f"{value['agent_type']} stands twice"))
        else:
            environments[environment["task"]] = environment
    if problems:
        raise UserMistake(problems)
    return environments


def _environment(given: Any) -> Environment | str:
    """Return the settings of an environment, or why there are none."""
    if not isinstance(given, dict) or not isinstance(given.get("agent_type"), str):
        return "has no agent_type"
    if unknown := [key for key in given if key not in _ENVIRONMENT_KEYS]:
        return f"unknown key {unknown[0]!r}{nearest(str(unknown[0]), _ENVIRONMENT_KEYS)}"
    arguments = {} if given.get("agent_args") is None else given["agent_args"]
    module, _, agent = given["agent_type"].rpartition(".")
    if agent not in _AGENTS or not _MODULE.fullmatch(module):
        return f"agent {' '.join(given['agent_type'].split())} has no task here{nearest(agent, list(_AGENTS))}"
    if not isinstance(arguments, dict):
        return f"agent_args: {arguments!r:.60} is no mapping"
    weight, only = given.get("weight", 1.0), given.get("evaluation_only", False)
    if not _is_number(weight) or not isinstance(only, bool):
        return "weight is a number and evaluation_only true or false"
    if wrong := _wrong(arguments):
        return wrong
    options = {"answer_format": arguments.get("answer_format", "tagged")}
    if "chat_mode" in arguments:
        options["chat"] = arguments["chat_mode"]
    rewards = {"format": float(arguments["format_reward"])} if "format_reward" in arguments else {}
    return {
        "task": _AGENTS[agent],
        "options": options,
        "weight": float(weight),
        "rewards": rewards,
        "evaluation_only": only,
    }


def _wrong(arguments: dict[Any, Any]) -> str:
    """Return what of an agent's arguments has no counterpart, or is of another type."""
    for key, value in arguments.items():
        if key in _WITHOUT_COUNTERPART and value != _WITHOUT_COUNTERPART[key]:
            return f"agent_args.{key}: {value!r} has no counterpart; write the task as a module of your own"
        if key not in _WITHOUT_COUNTERPART and key not in _ARGUMENTS:
            return f"agent_args.{key} has no counterpart{nearest(str(key), _ARGUMENTS)}"
    form, reward = arguments.get("answer_format", "tagged"), arguments.get("format_reward", 0.0)
    if not isinstance(form, str) or not isinstance(arguments.get("chat_mode", False), bool) or not _is_number(reward):
        return "agent_args: answer_format is a text, format_reward a number and chat_mode true or false"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
