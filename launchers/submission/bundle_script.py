"""Builds submit.sh of a bundle: a pure function of the steps, for any POSIX sh. It needs sbatch, and to cancel scancel.

What it does it notes in RUN/submissions/N/sent, a line before and after each call; launchers/planning/ledger.py reads

    begin, sending I, job I ID, released | cancelled WHY
"""

import re
import shlex

from jobs.artifacts.run_folder import RunFolder
from launchers.backends.slurm import dependency
from launchers.planning.chain import last_link
from launchers.submission.steps import Submit
from slurm.client import OUTER_NAMES, OUTER_PREFIXES

NAME = "submit.sh"

SCRIPT = r"""#!/bin/sh
# Sends submission @number@ of the run @run@:
# @count@ jobs, each when those that it needs have their ids. Written by `afterok bundle`. It needs sh and sbatch.
#
#   sh submit.sh
#
# A job that sbatch refuses ends it, and what it sent before is cancelled. A second call is refused while that stands.
set -uf
run=@quoted_run@
number=@number@
cluster=@cluster@
sent=$run/submissions/$number/sent
lock=$run/submit.lock
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac

refuse() {
    echo "afterok: $*" >&2
    exit 2
}

# Nothing of a job or a shell around this one may reach the jobs, or change what sbatch does.
newline='
'
IFS=$newline
for line in $(export -p); do
    line=${line#export }
    line=${line#declare -x }
    name=${line%%=*}
    case $name in
        @kept@ | *[!A-Za-z0-9_]*) ;;
        @outer@) unset "$name" ;;
    esac
done
unset IFS

[ -d "$run/submissions/$number" ] || refuse "$run/submissions/$number is not here: this node does not see the run"
[ -w "$run/submissions/$number" ] || refuse "$run/submissions/$number takes no writes: what is sent is noted there"
command -v sbatch > /dev/null || refuse "no sbatch in PATH=${PATH:-}"
# The ids of another cluster's jobs would be taken for this one's. Where scontrol is missing, nobody can tell.
answers=$(scontrol show config 2> /dev/null) || answers=
IFS=$newline
for line in $answers; do
    case $cluster,$line in
        ,* | *,"ClusterName "*"= $cluster") ;;
        *,"ClusterName "*"= "?*) refuse "this bundle is for the cluster $cluster, and here answers ${line##*= }" ;;
    esac
done
unset IFS

# One submitter a run: the lock is afterok's, which finds out whether this process lives.
start=0
if [ -r /proc/$$/stat ]; then
    read -r start < /proc/$$/stat
    start=${start##*) }
    set -- $start
    shift 19
    start=$1
fi
host=$(uname -n)
mine=$lock.$host.$$
printf '{"attempt":0,"restart":0,"job":"","host":"%s","pid":%s,"started":%s}\n' "$host" $$ "$start" > "$mine" ||
    refuse "$run takes no writes"
ln "$mine" "$lock" 2> /dev/null
locked=$?
rm -f "$mine"
[ $locked = 0 ] || refuse "somebody is submitting to $run right now; wait, or remove $lock if it is gone"
trap 'rm -f "$lock"' EXIT
trap 'take_back interrupted' HUP INT QUIT PIPE TERM

set +f
for later in "$run"/submissions/*; do
    later=${later##*/}
    case $later in
        *[!0-9]*) ;;
        *) [ "$later" -le "$number" ] || refuse "submission $later of $run was made since; make this bundle anew" ;;
    esac
done
set -f
last=cancelled
[ ! -e "$sent" ] || while read -r word _; do last=$word; done < "$sent"
case $last in
    cancelled | begin) ;; # nothing of it stands
    *) refuse "submission $number of $run was sent before, and stands: see afterok status, or $sent" ;;
esac

note() {
    echo "$*" >> "$sent" || {
        echo "afterok: $sent takes no more" >&2
        take_back "nothing could be noted"
    }
}

jobs=
sending=
take_back() {
    trap '' HUP INT QUIT PIPE TERM
    echo "afterok: $1" >&2
    # The job that was being sent may be there all the same. No other job has its name.
    if { [ -z "$sending" ] || scancel --name="$sending"; } && { [ -z "$jobs" ] || scancel $jobs; }; then
        echo "cancelled $1" >> "$sent"
        echo "afterok: nothing of submission $number stands${jobs:+; cancelled:$jobs}" >&2
    else
        echo "afterok: cancel these yourself: scancel$jobs${sending:+; scancel --name=$sending}" >&2
    fi
    exit 1
}

send() { # STEP PHASE NAME DEPENDENCY: sends one job, and sets `job`
    [ -r "$here/$2.sh" ] || take_back "$here/$2.sh is not there"
    cat "$here/$2.sh" > "$run/submissions/$number/scripts/$2.sh" || take_back "$here/$2.sh cannot be copied"
    note "sending $1"
    sending=$3
    printed=$(sbatch --parsable ${4:+"--dependency=$4"} "$here/$2.sh") || take_back "sbatch refused $2"
    job=
    IFS=$newline
    for line in $printed; do # ID, or ID;CLUSTER; a site's own words may stand around it
        line=${line%%;*}
        case $line in '' | *[!0-9]*) ;; *) job=$line ;; esac
    done
    unset IFS
    [ -n "$job" ] || {
        echo "afterok: no line of what sbatch said is a job's id: $printed" >&2
        take_back "sbatch gave no id for $2"
    }
    jobs="$jobs $job"
    sending=
    note "job $1 $job"
    echo "$2: job $job"
}

note begin
@calls@
note released
echo "submission $number of $run is sent: afterok status $run"
"""


def submit_script(run: RunFolder, number: int, steps: list[Submit], cluster: str) -> str:
    """Return the text of submit.sh, which sends `steps`, those of submission `number`, in their order.

    `cluster` is the ClusterName of the Slurm that they are for; "" where none was asked.
    """
    awaited: dict[str, str] = {}  # phase -> the shell's word for the job that its dependents wait on
    calls: list[str] = []
    for place, step in enumerate(steps):
        condition = dependency(step.needs, awaited)
        calls.append(f'send {place} {step.phase} {shlex.quote(step.name)} "{condition}"')
        calls.append(f"j{place}=$job")
        awaited[step.phase] = last_link(f"${{j{place}}}", step.links)
    said = {
        "number": str(number),
        "run": str(run.path),
        "cluster": shlex.quote(cluster),
        "quoted_run": shlex.quote(str(run.path)),
        "count": str(len(steps)),
        "kept": "SLURM_CONF | SLURM_CONF_SERVER",
        "outer": " | ".join([*(f"{prefix}*" for prefix in OUTER_PREFIXES), *OUTER_NAMES]),
        "calls": "\n".join(calls),
    }
    return re.sub(r"@(\w+)@", lambda word: said[word[1]], SCRIPT)  # in one go: a run's path may hold such a word too
