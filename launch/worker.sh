# What every TPU VM of a queued resource does at each boot. The launcher writes a header above this text that sets, in capitals,
# what belongs to the run. Nobody logs in: what a worker has to tell is an object below RECORDS.
#
#   generation        number of the newest start of all workers; the first worker raises it, the others follow
#   outcome-<worker>  how a worker ended for good: its number, its exit code, and why
#   stop              somebody wants the run to save and end
# shellcheck shell=bash
set -uo pipefail

say() { echo "curia: $*"; }

metadata() {
  curl --silent --fail --retry 5 --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# Number among the workers of all TPU slices, in the order in which JAX counts them.
number_of_this_worker() {
  local slice
  slice=$(metadata tpu-env | sed -n "s/^MEGASCALE_SLICE_ID: *'\{0,1\}\([0-9]*\).*/\1/p")
  echo $((${slice:-0} * HOSTS_PER_SLICE + $(metadata agent-worker-number)))
}

read_object() { gcloud storage cat "$RECORDS/$1" 2>/dev/null; }

write_object() {
  local try
  for try in 1 2 3 4 5; do
    printf '%s\n' "$2" | gcloud storage cp - "$RECORDS/$1" >/dev/null 2>&1 && return
    sleep $((try * PAUSE))
  done
  say "cannot write $RECORDS/$1"
}

# Before each start: what an earlier container, or a process that was started by hand, still holds.
clear_devices() {
  docker rm --force "$RUN" >/dev/null 2>&1
  local device holder
  for device in "$DEVICES"/accel* "$DEVICES"/vfio/*; do
    [ -e "$device" ] || continue
    for holder in $(fuser "$device" 2>/dev/null); do
      say "ends process $holder, which holds $device"
      kill -KILL "$holder" 2>/dev/null
    done
  done
  rm -f "$TEMPORARY/libtpu_lockfile"
}

prepare_machine() {
  mkdir -p "$STATE"
  # JAX asks for it: libtpu starts in seconds instead of minutes on v5e and newer.
  echo always 2>/dev/null >"$HUGE_PAGES" || say "transparent huge pages stay as they were"
  gcloud auth configure-docker "$REGISTRY" --quiet >/dev/null 2>&1 || say "no credentials for $REGISTRY"
  [ -z "$BUCKET" ] || mount_shards
}

mount_shards() {
  mountpoint --quiet "$MOUNT" && return
  if ! command -v gcsfuse >/dev/null; then
    local source=/etc/apt/sources.list.d/gcsfuse.list key=/usr/share/keyrings/cloud.google.asc
    curl --silent --fail --retry 5 --output "$key" https://packages.cloud.google.com/apt/doc/apt-key.gpg
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release --codename --short) main" >"$source"
    apt-get update --quiet && apt-get install --quiet --yes gcsfuse
  fi
  mkdir -p "$MOUNT" "$CACHE"
  printf '%s' "$MOUNT_CONFIG" >"$STATE/gcsfuse.yaml"
  gcsfuse --config-file="$STATE/gcsfuse.yaml" -o ro -o allow_other "$BUCKET" "$MOUNT" || say "cannot mount $BUCKET"
}

# Waits until it is time for another start, and prints its number.
next_generation() {
  local ran=$1 now
  if [ "$number" -eq 0 ]; then
    now=$(read_object generation)
    # Never back to a number that was used, though the bucket does not answer.
    now=$(((${now:-0} > ran ? ${now:-0} : ran) + 1))
    write_object generation "$now"
  else
    until now=$(read_object generation) && [ "${now:-0}" -gt "$ran" ]; do
      stopping && return 1
      sleep "$PAUSE"
    done
  fi
  echo "$now" | tee "$STATE/ran"
}

stopping() { read_object stop >/dev/null; }

# Runs all that the host has to run once; the exit code is that of the container.
run_once() {
  docker run --detach --name "$RUN" --privileged --net=host --ipc=host --init --ulimit memlock=-1 \
    --stop-timeout "$GRACE" --log-driver=gcplogs --env "CURIA_LAUNCH_ATTEMPT=$1" "${DOCKER_OPTIONS[@]}" \
    "$IMAGE" "${COMMAND[@]}" >/dev/null || return
  if [ "$number" -eq 0 ]; then # one is enough: the hosts stop together
    while [ "$(docker inspect --format '{{.State.Running}}' "$RUN")" = true ]; do
      stopping && docker stop --time "$GRACE" "$RUN" >/dev/null
      sleep "$PAUSE"
    done
  fi
  local code
  code=$(docker wait "$RUN")
  return "${code:-125}" # 125 is what docker says of itself
}

main() {
  local number ran generation code began outcome last=none alike=0 failures=0
  number=$(number_of_this_worker)
  prepare_machine
  # A machine that has just been made has run none of the starts there were before it was asked for.
  ran=$(cat "$STATE/ran" 2>/dev/null || metadata curia-generation || echo 0)
  outcome=$(read_object "outcome-$number")
  while [ -z "$outcome" ]; do
    clear_devices
    if generation=$(next_generation "$ran"); then
      ran=$generation
      say "start $generation of worker $number"
      began=$SECONDS
      run_once "$generation"
      code=$?
      say "start $generation ended with exit code $code"
      [ "$(systemctl is-system-running)" = stopping ] && return # the machine is being taken away
      failures=$((failures + 1))
      if [ "$code" = "$last" ] && [ $((SECONDS - began)) -lt "$FAST" ]; then alike=$((alike + 1)); else alike=1; fi
      last=$code
    fi
    if [[ " $FINAL " == *" ${code:-none} "* ]]; then
      outcome=$code
    elif stopping; then
      outcome="75 stopped"
    elif [ "$alike" -ge "$ALIKE" ]; then
      outcome="$code it failed $alike times in a row within $FAST s"
    elif [ "$failures" -gt "$MAX_RESTARTS" ]; then
      outcome="$code it failed more than $MAX_RESTARTS times"
    else
      sleep "$PAUSE"
      continue
    fi
    write_object "outcome-$number" "$number $outcome"
  done
  # Machines that have nothing left to do cost as much as before. The supervisor deletes them, unless it is gone.
  if [ "$number" -eq 0 ]; then
    sleep "$LINGER"
    gcloud compute tpus queued-resources delete "$RUN" --project="$PROJECT" --zone="$ZONE" --force --quiet --async ||
      say "cannot delete the queued resource; its machines still cost money"
  fi
}

main
