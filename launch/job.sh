# What a Slurm job of a run does at each of its starts. The launcher writes a header above this text with what belongs to the run.
# shellcheck shell=bash
set -uo pipefail
folder=$SLURM_SUBMIT_DIR
restarts=${SLURM_RESTART_COUNT:-0}

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export JAX_COORDINATOR_ADDRESS="$first:8476"
export CURIA_LAUNCH_COORDINATOR=$JAX_COORDINATOR_ADDRESS
export CURIA_LAUNCH_ATTEMPT="$SLURM_JOB_ID.$restarts"

echo "start $((restarts + 1)) of job $SLURM_JOB_ID"
# Each process knows its number from Slurm. The highest exit code of all is that of srun.
# shellcheck disable=SC2016 # the inner shell has the variable
srun --label --kill-on-bad-exit=0 bash -c 'JAX_PROCESS_ID=$SLURM_PROCID exec "$@"' start "${COMMAND[@]}"
code=$?
echo "start $((restarts + 1)) ended with exit code $code after $SECONDS s"

[[ " $FINAL " == *" $code "* ]] && exit "$code"
echo "$code $SECONDS" >>"$folder/failures"
if [ -e "$folder/stop" ]; then
  exit "$code"
fi
if [ "$(tail -n "$ALIKE" "$folder/failures" | awk -v code="$code" -v fast="$FAST" '$1 == code && $2 < fast' | wc -l)" -ge "$ALIKE" ]; then
  echo "error: it failed $ALIKE times in a row with exit code $code within $FAST s; not started again"
  exit "$code"
fi
if [ "$restarts" -ge "$MAX_RESTARTS" ]; then
  echo "error: it was started again $restarts times; not started again"
  exit "$code"
fi
scontrol requeue "$SLURM_JOB_ID"
