"""A recipe: which sources a training set is made of, how much of each, and what is held out for validation. YAML:

    about: OpenThoughts' reasoning and SmolTalk's direct answers
    params: {ot_stop: 1000000, chat_ratio: 0.3, seed: 42}     # what a phase may set otherwise, and their defaults
    seed: "${seed}"                # decides which rows are drawn
    by: rows                       # or tokens: what shares are counted in; both are reported
    short: report                  # or fail: where a source has too few rows for its share
    sources:
      openthoughts: {hub: "org/name:data/*.parquet", stop: "${ot_stop}", share: rest}
      smoltalk: {hub: org/other, share: "${chat_ratio}"}
      gsm8k: {hub: org/third}      # beside the shares: all of it
    validation:
      smoltalk_test: {hub: "org/other:data/test-*", stop: 2000}

A source without `share` is taken as far as its `stop`. The one with `share: rest` is, too, and it sets the measure of
those with a number, or with a list of numbers whose product it is. In such a list `rest` is what is left of the first
number by the other sources whose first is written alike. Files come from the phase (`recipe_sources`) or from the hub's
cache; `files_of` takes those of another source. What is drawn is a pure function of the rows, the recipe and its
parameters (draw.py).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from data_tools.base.declared import names_a_file, setting
from data_tools.base.inside import expanded
from data_tools.base.yaml_loaders import read_file, read_values
from data_tools.mistake import Problem, UserMistake, nearest
from data_tools.recipes.views import KINDS, View
from data_tools.records import sources
from data_tools.records.hub import dataset_files, is_dataset
from data_tools.records.inputs import records_of

FOLDER = Path(__file__).parent
BY, SHORT, REST = ("rows", "tokens"), ("report", "fail"), "rest"

_KEYS = ("about", "params", "seed", "by", "short", "sources", "validation")
_SOURCE_KEYS = ("about", "hub", "files_of", "stop", "share", "view", "where", "held_out")
_KINDS = {int: "whole number", float: "number", str: "text"}
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_PARAM = re.compile(r"\$\{([^}]*)\}")


@dataclass
class Files:
    """The files of one source of a recipe."""

    inputs: list[str] = setting(
        list, "files, in place of those of the hub's cache", example=["chats.jsonl"], input=True
    )


@dataclass(frozen=True)
class RecipeSource:
    """Represents one source of a recipe, its parameters put in."""

    name: str
    hub: str = ""  # where its files are, unless the phase gives some
    files_of: str = ""  # a source whose files it takes, too
    about: str = ""
    stop: int = 0  # rows of it, at most; 0: all
    share: float | None = None  # of the mix; None: beside it
    is_rest: bool = False
    view: str = ""
    where: Mapping[str, list[Any]] = field(default_factory=dict)  # column: the values that a row may have
    held_out: int = 0  # rows that go to the validation set, and are not trained on
    is_validation: bool = False


@dataclass(frozen=True)
class Recipe:
    """Represents a recipe, its parameters put in."""

    name: str
    seed: int
    by: str
    short: str
    sources: tuple[RecipeSource, ...]  # those of the validation set first: of equal rows theirs is the one that counts

    def plain(self) -> dict[str, Any]:
        """Return what it came to as plain data, for the key of a phase: neither its name nor what only explains."""
        kept = [{key: value for key, value in vars(source).items() if key != "about"} for source in self.sources]
        return {"seed": self.seed, "by": self.by, "short": self.short, "sources": kept}


class Origin(NamedTuple):
    """Says where rows of a store come from: a file, under the name that the balance has for it, and how they are
    read. `source` is the number of its source in a recipe."""

    name: str
    path: Path
    view: View | None = None
    source: int = 0


def names() -> list[str]:
    """Return the recipes that come with afterok."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def resolve(recipe: str, params: Mapping[str, Any]) -> Recipe:
    """Return a recipe by its name, or of a YAML file, with these parameters set otherwise.

    Raise UserMistake with every unknown key, wrong value and unknown parameter; places are those in a phase's settings.
    """
    return _Reader(recipe, params).recipe()


def origins(recipe: Recipe, given: Mapping[str, Files]) -> list[Origin]:
    """Return the files of all sources in their order. Raise UserMistake with every data set that is missing, all at
    once, and how it is got."""
    problems: list[Problem] = []
    found: list[Origin] = []
    for number, source in enumerate(recipe.sources):
        files = [file for name in _given(source, given) for file in records_of(name)]
        if twice := sorted({str(file) for place, file in enumerate(files) if file in files[:place]}):
            where = f"recipe_sources.{source.name if source.name in given else source.files_of}.inputs"
            problem = Problem(where, f"{', '.join(twice)} is given twice; name each file once")
            problems += [problem] if problem not in problems else []
        if not files:
            try:
                files = _files_of_hub(source, recipe)
            except UserMistake as mistake:
                problems += [each for each in mistake.problems if str(each) not in map(str, problems)]
        short = sources.short_names([str(file) for file in files])
        view = View(source.view, dict(source.where)) if source.view or source.where else None
        folder = f"{sources.VALIDATION if source.is_validation else ''}{source.name}"
        found += [Origin(f"{folder}/{name}", file, view, number) for name, file in zip(short, files)]
    if problems:
        raise UserMistake(problems)
    return found


def _given(source: RecipeSource, given: Mapping[str, Files]) -> list[str]:
    """Return the files that a phase gives for a source, or for the one whose files it takes."""
    return given.get(source.name, Files()).inputs or given.get(source.files_of, Files()).inputs


def _files_of_hub(source: RecipeSource, recipe: Recipe) -> list[Path]:
    where = f"recipe_sources.{source.files_of or source.name}.inputs"
    if not source.hub:
        reason = f"recipe {recipe.name} has no files for it{f': {source.about}' if source.about else ''}; give some"
        raise UserMistake(Problem(where, reason))
    try:
        return dataset_files(source.hub)
    except UserMistake as mistake:
        told = "; ".join(map(str, mistake.problems)).replace("source.inputs", where)
        raise UserMistake(Problem(where, told)) from None


def unread(recipe: Recipe, given: Mapping[str, Files]) -> list[str]:
    """Return the sources with files that this recipe does not have. Raise UserMistake for those of no recipe."""
    own = [name for source in recipe.sources for name in (source.name, source.files_of) if name]
    more = [name for name, files in given.items() if files.inputs and name not in own]
    shipped = [source for name in names() for source in resolve(name, {}).sources] if more else []
    known = {name for source in shipped for name in (source.name, source.files_of)}
    problems = [
        Problem(f"recipe_sources.{name}", f"recipe {recipe.name} has no source of this name{nearest(name, own)}")
        for name in given
        if name in more and name not in known
    ]
    if problems:
        raise UserMistake(problems)
    return more


def told(recipe: Recipe, given: Mapping[str, Files]) -> list[str]:
    """Return what a recipe came to, a line a source, for people."""
    lines = [f"recipe {recipe.name}, by {recipe.by}, seed {recipe.seed}:"]
    for source in recipe.sources:
        files = _given(source, given)
        place = f"{len(files)} file{'s' if len(files) != 1 else ''} of yours" if files else source.hub
        much = f"{source.stop:,} rows at most" if source.stop else "all rows"
        if source.share is not None:
            much = f"share {source.share:.4g}" + (f" (the rest; {much})" if source.is_rest else "")
        more = [f"as {source.view}"] if source.view else []
        more += [f"where {key} is {' or '.join(map(str, values))}" for key, values in source.where.items()]
        more += [f"{source.held_out:,} rows held out"] if source.held_out else []
        purpose = "validation: " if source.is_validation else ""
        lines.append(f"  {purpose}{source.name}: {', '.join([much, *more])}; {place or 'no files'}")
    return lines + [f"  files of {name} are not read: the recipe has no such source" for name in unread(recipe, given)]


class _Reader:
    """Reads one recipe, and collects what is wrong with it."""

    def __init__(self, recipe: str, params: Mapping[str, Any]):
        self.name, self.given, self.problems = recipe, params, list[Problem]()
        self.path = expanded(recipe) if names_a_file(recipe) else FOLDER / f"{recipe}.yaml"
        self.params: dict[str, Any] = {}
        self.put_in: dict[str, list[str]] = {}  # of each key, the parameters that its value was made of

    def recipe(self) -> Recipe:
        raw = self._read()
        self._unknown(raw, _KEYS, "")
        self.params = self._params(raw.get("params") or {})
        sources = self._sources(raw, "validation") + self._sources(raw, "sources")
        if not any(not source.is_validation for source in sources):
            self._note("sources", "there are none; a recipe names at least one")
        of_group = [{source.name for source in sources if source.is_validation == is_one} for is_one in (True, False)]
        if twice := of_group[0] & of_group[1]:
            self._note("validation", f"each of {', '.join(sorted(twice))} stands once, in sources or in validation")
        sources = [self._with_files(source, sources) for source in sources]
        written = raw.get("sources")
        sources = self._with_rest(sources, written if isinstance(written, dict) else {})
        found = Recipe(
            name=self.path.stem,
            seed=self._value(raw, "seed", 0, int),
            by=self._choice(raw, "by", BY),
            short=self._choice(raw, "short", SHORT),
            sources=tuple(sources),
        )
        if self.problems:
            raise UserMistake(self.problems)
        return found

    def _read(self) -> dict[str, Any]:
        if not names_a_file(self.name) and self.name not in names():
            raise UserMistake(Problem("recipe", f"unknown recipe {self.name!r}{nearest(self.name, names())}"))
        try:
            raw = read_values(read_file(self.path))
        except FileNotFoundError:
            raise UserMistake(Problem("recipe", f"no file {self.path}{nearest(self.path.stem, names())}")) from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserMistake(Problem("recipe", f"{self.path}: cannot be read: {error}")) from None
        except yaml.YAMLError as error:
            reason = f"{self.path}: not valid YAML: {' '.join(str(error).split())}"
            raise UserMistake(Problem("recipe", reason)) from None
        if not isinstance(raw, dict):
            raise UserMistake(Problem("recipe", f"{self.path}: a recipe is a mapping of {', '.join(_KEYS)}"))
        return raw

    def _note(self, key: str, message: str) -> None:
        """Note a problem of a key of the recipe; where a parameter of the phase gave its value, at that parameter."""
        if by := [name for name in self.put_in.get(key, ()) if name in self.given]:
            message = f"{message} ({key} of recipe {self.path.stem})"
            self.problems += [Problem(f"recipe_params.{name}", message) for name in by]
        else:
            self.problems.append(Problem("recipe", f"{self.path}: {key}: {message}"))

    def _unknown(self, written: Mapping[Any, Any], known: tuple[str, ...], prefix: str) -> None:
        for key in written:
            if key not in known:
                self._note(f"{prefix}{key}", f"unknown key{nearest(str(key), known)}")

    def _params(self, defaults: Any) -> dict[str, Any]:
        """Return the parameters: the recipe's, over them what the phase gives, each of the default's type."""
        if not isinstance(defaults, dict):
            self._note("params", f"{defaults!r} is not a mapping")
            return {}
        params = dict(defaults)
        for name in [name for name, default in defaults.items() if default is None]:
            self._note(f"params.{name}", "has no default, which says what may stand there; write one")
        for name, value in self.given.items():
            if name not in defaults:
                unknown = f"recipe {self.path.stem} has no parameter of this name{nearest(name, list(defaults))}"
                self.problems.append(Problem(f"recipe_params.{name}", unknown))
                continue
            wanted = type(defaults[name])
            is_number = wanted is float and isinstance(value, int) and not isinstance(value, bool)
            if type(value) is not wanted and not is_number:
                wrong = f"{value!r} is no {_KINDS.get(wanted, wanted.__name__)} such as {defaults[name]!r}"
                wrong += (
                    f"; write {int(value)}" if wanted is int and isinstance(value, float) and value % 1 == 0 else ""
                )
                self.problems.append(Problem(f"recipe_params.{name}", wrong))
                continue
            params[name] = value
        return params

    def _put_in(self, key: str, value: Any) -> Any:
        """Return a value with its parameter in place of `${name}`, in lists and mappings too."""
        if isinstance(value, list):
            return [self._put_in(key, entry) for entry in value]
        if isinstance(value, dict):
            return {name: self._put_in(f"{key}.{name}", entry) for name, entry in value.items()}
        match = _PARAM.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            if isinstance(value, str) and "${" in value:
                self._note(key, f"{value!r}: a parameter stands alone, as ${{name}}")
            return value
        if match[1] not in self.params:
            self._note(key, f"{value!r} is no parameter{nearest(match[1], list(self.params))}")
            return None
        self.put_in.setdefault(key, []).append(match[1])
        return self.params[match[1]]

    def _value(self, of: Mapping[str, Any], key: str, default: Any, kind: type, prefix: str = "") -> Any:
        value = self._put_in(prefix + key, of.get(key, default))
        if kind is int and isinstance(value, int) and not isinstance(value, bool) and (value >= 0 or key == "seed"):
            return value
        if kind is str and isinstance(value, str):
            return value
        if value is not None:  # None of a parameter that is not there, which was told
            whole = "a whole number" if key == "seed" else "a whole number from 0"
            self._note(prefix + key, f"{value!r} is not {whole if kind is int else 'a text'}")
        return default

    def _choice(self, raw: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> str:
        value = self._put_in(key, raw.get(key, choices[0]))
        if value not in choices:
            self._note(key, f"unknown value {value!r}{nearest(str(value), choices)}")
        return str(value)

    def _sources(self, raw: Mapping[str, Any], group: str) -> list[RecipeSource]:
        written = raw.get(group) or {}
        if not isinstance(written, dict):
            self._note(group, f"{written!r} is not a mapping of sources")
            return []
        return [self._source(name, body, group) for name, body in written.items()]

    def _source(self, name: Any, body: Any, group: str) -> RecipeSource:
        prefix, of = f"{group}.{name}.", body if isinstance(body, dict) else {}
        if not _NAME.fullmatch(str(name)):
            self._note(f"{group}.{name}", f"{name!r} is no name of a source (lower-case letters, digits, _)")
        if body is not None and not isinstance(body, dict):
            self._note(f"{group}.{name}", f"{body!r} is not a mapping of {', '.join(_SOURCE_KEYS)}")
        self._unknown(of, _SOURCE_KEYS, prefix)
        hub, view = self._value(of, "hub", "", str, prefix), self._value(of, "view", "", str, prefix)
        if hub and not is_dataset(hub):
            self._note(f"{prefix}hub", f"{hub!r} is no dataset: write org/name, org/name@revision or org/name:glob")
        if view and view not in KINDS:
            self._note(f"{prefix}view", f"unknown view {view!r}{nearest(view, KINDS)}")
        where = self._put_in(f"{prefix}where", of.get("where") or {})
        if not isinstance(where, dict) or not all(isinstance(values, list) and values for values in where.values()):
            self._note(f"{prefix}where", f"{where!r} is not a mapping of columns to the values that a row may have")
            where = {}
        is_validation = group == "validation"
        for key in ("share", "held_out"):
            if is_validation and key in of:
                self._note(f"{prefix}{key}", "is for a source that is trained on; a validation set has a stop")
        share, is_rest = self._share(of.get("share"), f"{prefix}share")
        return RecipeSource(
            name=str(name),
            hub=hub,
            files_of=self._value(of, "files_of", "", str, prefix),
            about=self._value(of, "about", "", str, prefix),
            stop=self._stop(of, prefix),
            share=share,
            is_rest=is_rest,
            view=view,
            where=where,
            held_out=self._value(of, "held_out", 0, int, prefix),
            is_validation=is_validation,
        )

    def _with_files(self, source: RecipeSource, sources: list[RecipeSource]) -> RecipeSource:
        """Return a source that takes the files of another one with where those are."""
        if not source.files_of:
            return source
        other = next((each for each in sources if each.name == source.files_of and each.name != source.name), None)
        if other is None:
            known = [each.name for each in sources if each.name != source.name]
            self._note(
                f"sources.{source.name}.files_of", f"no source {source.files_of!r}{nearest(source.files_of, known)}"
            )
            return source
        return replace(source, hub=source.hub or other.hub, about=source.about or other.about)

    def _stop(self, of: Mapping[str, Any], prefix: str) -> int:
        """Return the most rows of a source; nanochat writes -1 for all."""
        written = self._put_in(f"{prefix}stop", of.get("stop", 0))
        return 0 if written == -1 else self._value({"stop": written}, "stop", 0, int, prefix)

    def _share(self, written: Any, key: str) -> tuple[float | None, bool]:
        """Return (share, whether it is the rest's). In a list `rest` counts as 0 until the others are known."""
        value = self._put_in(key, written)
        if value is None or value == REST:
            return None, value == REST
        share = 1.0
        for place, factor in enumerate(value if isinstance(value, list) else [value]):
            if place and factor == REST:
                return 0.0, False
            if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < 1:
                self._note(key, f"{factor!r} is no share from 0 to below 1, nor `{REST}`")
                return None, False
            share *= factor
        return share, False

    def _with_rest(self, sources: list[RecipeSource], written: Mapping[str, Any]) -> list[RecipeSource]:
        """Return the sources with the shares of the rest: what the others leave, of all or of their first factor."""
        sources = [self._rest_of_group(source, sources, written) for source in sources]
        shares = sum(source.share for source in sources if source.share is not None)
        rests = [source.name for source in sources if source.is_rest]
        if not rests and not any(source.share is not None for source in sources):
            return sources
        if len(rests) != 1:
            found = f"{', '.join(rests)} have it" if rests else "none has it"
            self._note("sources", f"one source has `share: {REST}`, which sets the measure of the others; {found}")
        elif shares >= 1 - 1e-9:
            self._note(f"sources.{rests[0]}.share", f"the other shares are {shares:g} together and leave nothing")
        return [replace(source, share=1 - shares) if source.is_rest else source for source in sources]

    def _rest_of_group(
        self, source: RecipeSource, sources: list[RecipeSource], written: Mapping[str, Any]
    ) -> RecipeSource:
        own = _factors(written, source.name)
        if REST not in own[1:] or source.share is None:
            return source
        first = self._put_in("", own[0])
        others = [other for other in sources if other != source and _factors(written, other.name)[:1] == own[:1]]
        left = first - sum(other.share or 0 for other in others)
        left = 0.0 if abs(left) < 1e-9 else left  # 0.3 · 0.9 and 0.3 · 0.1 are 0.3
        if len(own) != 2 or left < 0 or any(REST in _factors(written, other.name) for other in others):
            names = ", ".join(other.name for other in others)
            self._note(
                f"sources.{source.name}.share", f"{own!r}: {names} leave no rest of {first:g}, or it is not one's"
            )
            return source
        return replace(source, share=left)


def _factors(written: Mapping[str, Any], name: str) -> list[Any]:
    """Return the list that a source's share is written as, none of another form."""
    body = written.get(name)
    share = body.get("share") if isinstance(body, dict) else None
    return share if isinstance(share, list) else []
