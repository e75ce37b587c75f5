#!/bin/bash
# Run a command on all nodes of a SkyPilot cluster, in this directory; the code is that of the first that fails.
export MACHINE_RANK=0
for ip in $SKYPILOT_NODE_IPS; do
  if [ $MACHINE_RANK = 0 ]; then
    "$@" &
    trap "kill -TERM $!" TERM INT # the processes of a training agree to stop, so that those of other nodes save, too
  else
    variables=$(export -p | grep -E ' (NUM_MACHINES|MACHINE_RANK|MASTER_ADDR|MASTER_PORT|HF_[A-Z_]+)=')
    ssh -tt -o StrictHostKeyChecking=no "$ip" "$variables; cd $(printf %q "$PWD") && $(printf '%q ' "$@")" &
  fi
  MACHINE_RANK=$((MACHINE_RANK + 1))
done
code=0
for job in $(jobs -p); do
  wait "$job"
  own=$?
  while kill -0 "$job" 2> /dev/null; do wait "$job"; own=$?; done # a signal ends only the first wait
  if [ $own != 0 ] && [ $code = 0 ]; then
    code=$own
    for _ in {1..30}; do [ -z "$(jobs -pr)" ] || sleep 1; done # the others may be saving
    kill -TERM $(jobs -pr) 2> /dev/null
  fi
done
exit $code
