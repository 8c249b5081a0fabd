"""Writes the completion of `afterok` for a shell, by shtab, which comes with the extra `shell`.

What is written is static: a shell that completes starts no Python. Runs are those below ./runs; phases those of the run
that was named, else of the one submitted last.
"""

import argparse

from data_tools.mistake import UserMistake

SHELLS = ("bash", "zsh")
# `_afterok_names runs|phases WORDS…` prints one name a line, in both shells. A name that a shell would not take as it
# is, such as $(reboot), is left out.
_NAMES = """
_afterok_names() {
  [ -n "$ZSH_VERSION" ] && setopt localoptions nullglob
  local run= place word
  if [ "$1" = runs ]; then
    for place in runs/*/ledger.jsonl; do word=${place#runs/}; _afterok_plain "${word%/ledger.jsonl}"; done
    return
  fi
  shift
  for place in runs/*/ledger.jsonl; do
    place=${place%/ledger.jsonl}
    if [ -z "$run" ] || [ "$place/submissions" -nt "$run/submissions" ]; then run=$place; fi
  done
  for word in "$@"; do
    if [ -e "$word/ledger.jsonl" ]; then run=$word; elif [ -e "runs/$word/ledger.jsonl" ]; then run=runs/$word; fi
  done
  [ -n "$run" ] && for place in "$run"/*/logs; do place=${place%/logs}; _afterok_plain "${place##*/}"; done
}
_afterok_plain() {
  case $1 in *[!A-Za-z0-9_.,=+@-]*) ;; *) printf '%s\\n' "$1" ;; esac
}
"""
_BASH = """
_afterok_matching() {
  local name
  while IFS= read -r name; do [[ "$name" == "$1"* ]] && printf '%s\\n' "$name"; done
}
_afterok_runs() { _afterok_names runs | _afterok_matching "$1"; compgen -d -- "$1"; }
_afterok_phases() { _afterok_names phases "${COMP_WORDS[@]:2}" | _afterok_matching "$1"; }
_afterok_runs_and_phases() { _afterok_runs "$1"; _afterok_phases "$1"; }
"""
_ZSH = """
_afterok_runs() { compadd -- ${(f)"$(_afterok_names runs)"}; _files -/ }
_afterok_phases() { compadd -- ${(f)"$(_afterok_names phases ${words[3,-1]})"} }
_afterok_runs_and_phases() { _afterok_runs; _afterok_phases }
"""
_COMPLETED = {  # of an argument by its name: the function that completes it
    "run": "_afterok_runs",
    "runs": "_afterok_runs",
    "diff": "_afterok_runs",
    "phase": "_afterok_runs_and_phases",
    "phases": "_afterok_phases",
    "words": "_afterok_runs_and_phases",
    "parallel": "_afterok_phases",
}
_FILES = ("pipeline", "what", "output", "svg", "folder", "prefix")
_KINDS = "explain"  # whose `phase` is a kind


def script_for(shell: str, parser: argparse.ArgumentParser) -> str:
    """Return the completion script of a command line for a shell. Raise UserMistake where shtab is missing."""
    try:
        import shtab
    except ImportError:
        raise UserMistake("completion: shtab is not installed: pip install 'afterok[shell]'") from None
    from launchers.observe.explain import kinds

    actions = _actions(parser)
    with_phase = {verb for verb, action in actions if action.dest == "phase"}
    for verb, action in actions:
        if verb == _KINDS and action.dest == "phase":
            action.choices = [name for name, _ in kinds()]
        elif action.dest in _COMPLETED:
            # where RUN may be left out before PHASE, the first word may be either
            name = _COMPLETED["words" if action.dest == "run" and verb in with_phase else action.dest]
            action.complete = {"bash": name, "zsh": name}  # type: ignore[attr-defined]
        elif action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    script = shtab.complete(parser, shell, preamble=_NAMES + {"bash": _BASH, "zsh": _ZSH}[shell])
    # shtab's registers itself under `eval` alone: under `source`, too; as a file of fpath it is the function itself
    return script.replace("$zsh_eval_context[-1] == eval", "$zsh_eval_context[-1] == (eval|file)")


def _actions(parser: argparse.ArgumentParser, verb: str = "") -> list[tuple[str, argparse.Action]]:
    """Return the arguments of a parser and of all below it, each with its verb."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                found += _actions(below, name)
        else:
            found.append((verb, action))
    return found
