"""MMLU (cais/mmlu): questions of 57 subjects with four choices. For evaluation; the subject is what it tells apart.

`subjects` are some of the groups below or of the subjects by name, with commas; "" for all. A record names its own
under `subject` (the hub), or `type` (Qwen2.5-Math's files); one of another subject gives no prompt.
"""

from dataclasses import dataclass
from typing import Any

from data_tools.base.declared import setting
from data_tools.mistake import nearest
from data_tools.tasks import math_answers, multiple_choice
from data_tools.tasks.multiple_choice import REWARDS, compares, final_answer, rewards
from data_tools.tasks.task import Item

__all__ = ["HUB", "REWARDS", "Options", "check_options", "compares", "final_answer", "items", "rewards"]

HUB = "cais/mmlu:all/test-*.parquet"

# The groups of Hendrycks et al. (2021); its 18 STEM subjects are what `science` means, too.
GROUPS = {
    "stem": (
        "abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics "
        "college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics "
        "high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics "
        "high_school_physics high_school_statistics machine_learning"
    ).split(),
    "humanities": (
        "formal_logic high_school_european_history high_school_us_history high_school_world_history international_law "
        "jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law "
        "world_religions"
    ).split(),
    "social_sciences": (
        "econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics "
        "high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations "
        "security_studies sociology us_foreign_policy"
    ).split(),
    "other": (
        "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
        "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology"
    ).split(),
}
GROUPS["science"] = GROUPS["stem"]
SUBJECTS = sorted({subject for subjects in GROUPS.values() for subject in subjects})


@dataclass
class Options(multiple_choice.Options):
    subjects: str = setting("", 'groups or subjects, with commas; "": all', free=True)


def check_options(options: Options) -> list[str]:
    known = [*GROUPS, *SUBJECTS]
    unknown = [name for name in _names(options) if name not in known]
    return math_answers.check_options(options) + [f"unknown subject {name!r}{nearest(name, known)}" for name in unknown]


def items(record: dict[str, Any], options: Options) -> list[Item]:
    subject = record.get("subject", record.get("type"))
    if not isinstance(subject, str) or subject not in SUBJECTS:
        raise ValueError(f"'subject' is {subject!r}, none of MMLU's")
    names = _names(options)
    if names and subject not in {one for name in names for one in GROUPS.get(name, [name])}:
        return []
    if options.answered_by == "generation":
        return multiple_choice.items(record, options)
    [item] = multiple_choice.items(record, options)
    about = subject.replace("_", " ")
    prompt = f"The following are multiple choice questions (with answers) about {about}.\n\n{item.prompt}"
    return [Item.of(prompt, item.answer, item.columns, item.question)]


def _names(options: Options) -> list[str]:
    return [name.strip() for name in options.subjects.split(",") if name.strip()]
