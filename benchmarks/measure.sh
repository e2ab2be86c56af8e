#!/usr/bin/env bash
# Measures the committed CPU rows anew, topic by topic; then `python -m benchmarks.plot` makes the tables and figures.
#
#   benchmarks/measure.sh [TOPIC...] [-- --peer-path DIR ...]
#
# TOPIC      bars latency layer memory network sweep training (default: all). A topic's rows are replaced when all of its
#            commands have run; if one fails, the old rows stay and the new ones lie beside them as *.failed.jsonl
# after --   options for every command that measures rivals
# PYTHON     the interpreter (default: .venv/bin/python if there is one, else python3)
# RUN        put before every timed command, for example a wrapper that keeps the machine quiet; none takes over a minute
#            on two cores except where torch.compile meets a contestant for the first time
# RESULTS    folder of the rows (default: benchmarks/results)
# SMOKE=1    hardly any time for each measurement: to see that everything runs, into another RESULTS
set -uo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then PYTHON=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3); fi
results=${RESULTS:-benchmarks/results} run=${RUN:-}
if [ -n "${SMOKE:-}" ] && [ -z "${RESULTS:-}" ]; then echo "SMOKE: expected RESULTS=DIR, so that no good rows are lost" >&2; exit 2; fi
smoke=${SMOKE:+--seconds 0.01}
topics=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do topics+=("$1"); shift; done
[ $# -gt 0 ] && shift
peers=("$@")
[ ${#topics[@]} -gt 0 ] || topics=(bars latency layer memory network sweep training)
for topic in "${topics[@]}"; do
  case $topic in bars | latency | layer | memory | network | sweep | training) ;; *) echo "unknown topic $topic" >&2; exit 2 ;; esac
done
shapes=(256,64,64,5 1024,256,256,5 4096,784,64,5 256,1024,1024,5 1024,256,256,20 65536,2,5,5 65536,5,1,5)
few=(256,64,64,5 1024,256,256,5 65536,2,5,5)
failed=0
mkdir -p "$results"

# measure ARGUMENTS...: appends rows of one command to the topic's new ones
measure() {
  # shellcheck disable=SC2086  # RUN and smoke may hold several words
  $run "$PYTHON" -m benchmarks --device cpu --out "$new" "$@" $smoke || { echo "failed: $topic $*" >&2; wrong=1; }
}

for topic in "${topics[@]}"; do
  start=$SECONDS wrong=0 new=$results/cpu_$topic.failed.jsonl
  rm -f "$new"
  case $topic in
    bars) for shape in "${shapes[@]}"; do measure --what bars --shapes "$shape" --extras --memory; done ;;
    latency) measure --what latency ;;
    layer)
      for phase in forward step; do
        for shape in "${shapes[@]}"; do measure --shapes "$shape" --phases $phase --seconds 2.5 "${peers[@]}"; done
      done
      for phase in optimiser second_derivative; do
        for shape in "${few[@]}"; do measure --shapes "$shape" --phases $phase "${peers[@]}"; done
      done
      ;;
    # Without phases no times: these rows join those of cpu_layer.jsonl.
    memory) for shape in "${few[@]}"; do measure --shapes "$shape" --phases --memory "${peers[@]}"; done ;;
    network) measure --what network "${peers[@]}" ;;
    sweep)
      for axis in grid_size spline_order; do
        measure --what sweep --axes $axis --seconds 0.3 --backend native "${peers[@]}"
      done
      for size in 1 4 16 64 256 1024 4096 16384; do
        measure --what sweep --axes batch --shapes $size,256,256,5 --seconds 0.3 --backend native "${peers[@]}"
      done
      for size in 8 16 32 64 128 256 512 1024; do
        measure --what sweep --axes width --shapes 1024,$size,$size,5 --seconds 0.3 --backend native "${peers[@]}"
      done
      ;;
    training) for task in digits function poisson; do measure --what training --tasks $task --seconds 1.8; done ;;
  esac
  if [ $wrong = 0 ]; then mv "$new" "$results/cpu_$topic.jsonl"; else failed=1; fi
  echo "$topic: $((SECONDS - start)) s"
done
exit $failed
