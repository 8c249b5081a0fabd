"""The model card of a packaged folder: what it is, how to serve it, how good it is, and what it was made of."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from data_tools.evaluations.accuracy import headline


class Step(TypedDict):
    """A sealed phase that a model was made by."""

    phase: str
    uses: str
    key: str
    digest: str  # of its seal, over the bytes of its files
    headline: str
    settings: dict[str, Any]  # as they were keyed: inputs by the SHA-256 of their bytes
    needs: list[str]
    sealed_at: float  # seconds since 1970
    packages: dict[str, str]


class Facts(TypedDict):
    """What a card tells of the folder."""

    name: str
    description: str
    base: str
    license: str
    tags: list[str]
    files: dict[str, str]  # name -> what it is


def model_card(facts: Facts, results: Mapping[str, Mapping[str, Any]], lineage: Sequence[Step]) -> str:
    """Return README.md. `results`: evaluations by the name of their phase."""
    parts = [_front_matter(facts), f"# {facts['name']}\n", f"{facts['description']}\n", "## Files\n"]
    parts.append("".join(f"* `{name}`: {what}\n" for name, what in facts["files"].items()))
    if results:
        parts.append("## Evaluation\n")
        parts.append("".join(f"* {name}: {headline(result)}\n" for name, result in results.items()))
    parts.append("## Lineage\n")
    if not lineage:
        parts.append("Not known: it was packaged outside of a run.\n")
    else:
        packages = ", ".join(f"{name} {version}" for name, version in lineage[-1]["packages"].items())
        parts.append(f"Made by afterok in these phases, with {packages}.\n")
        parts.append(_table(lineage))
        parts.append("The settings of each, with inputs by the SHA-256 of their bytes:\n")
        settings = {step["phase"]: {"uses": step["uses"], **step["settings"]} for step in lineage}
        parts.append(f"```json\n{json.dumps(settings, indent=1, ensure_ascii=False)}\n```\n")
    return "\n".join(parts)


def _front_matter(facts: Facts) -> str:
    """Return the block that the Hub reads. JSON is YAML, and needs no rules about quoting."""
    said: dict[str, Any] = {"pipeline_tag": "text-generation", "library_name": "transformers", "tags": facts["tags"]}
    said |= {"base_model": facts["base"]} if facts["base"] else {}
    said |= {"license": facts["license"]} if facts["license"] else {}
    lines = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in said.items())
    return f"---\n{lines}---\n"


def _table(lineage: Sequence[Step]) -> str:
    rows = [("phase", "kind", "made of", "seal", "what came of it"), ("---",) * 5]
    for step in lineage:
        rows.append(
            (step["phase"], step["uses"], ", ".join(step["needs"]), step["digest"][:12], _cell(step["headline"]))
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
