# What pipeline.sbatch and phase.sbatch do: find afterok's Python, and give it the words of the job. No job of its own.
#
# The Python is $AFTEROK_PYTHON and no other where that is set, or that of the checkout or environment which this file
# lies in, or the one in PATH: the first that has afterok and what afterok needs.
# What was exported with the job (`sbatch --export=…`) may be nothing, not even PATH and HOME.
for python in "${AFTEROK_PYTHON:-}" "$home/.venv/bin/python" "$home/../../../bin/python" \
    "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "$(command -v python3)" "$(command -v python)"; do
    if [ -x "$python" ] && PYTHONPATH="$home" "$python" -P -c 'import launchers.door, omegaconf, submitit' 2> /dev/null; then
        export AFTEROK_EXPORT="${SLURM_EXPORT_ENV:-}" PATH PYTHONPATH="$home" PYTHONUNBUFFERED=1
        exec "$python" -P -m launchers.door "$door" "$@"
    fi
    [ -z "${AFTEROK_PYTHON:-}" ] || break
done
[ -z "${AFTEROK_PYTHON:-}" ] || echo "afterok: AFTEROK_PYTHON=$AFTEROK_PYTHON cannot import it" >&2
echo "afterok: no Python here has it; name one that does: sbatch --export=AFTEROK_PYTHON=/…/bin/python,… $door.sbatch" >&2
exit 2
