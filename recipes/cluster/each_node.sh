#!/bin/bash
# Run a command on all nodes of a SkyPilot cluster, in this directory; the code is that of the first that fails.
trap 'kill -TERM $(jobs -p)' TERM INT
export MACHINE_RANK=0
for ip in $SKYPILOT_NODE_IPS; do
  if [ $MACHINE_RANK = 0 ]; then
    "$@" &
  else
    variables=$(export -p | grep -E ' (NUM_MACHINES|MACHINE_RANK|MASTER_ADDR|MASTER_PORT|HF_[A-Z_]+)=')
    ssh -tt -o StrictHostKeyChecking=no "$ip" "$variables; cd $(printf %q "$PWD") && $(printf '%q ' "$@")" &
  fi
  MACHINE_RANK=$((MACHINE_RANK + 1))
done
code=0
for job in $(jobs -p); do wait "$job" || { code=$?; kill -TERM $(jobs -pr) 2> /dev/null; }; done
exit $code
