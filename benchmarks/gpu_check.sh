#!/usr/bin/env bash
# Everything worth knowing from a machine with an NVIDIA GPU, in one command: build, correctness, instruction probes,
# sanitizers, benchmarks, profile. Each stage reports and the next still runs. Needs no network: it uses the torch, ninja,
# pybind11, setuptools and pytest of the Python it is given.
#
#   benchmarks/gpu_check.sh [OUT_DIR] [--minutes N] [--only STAGE,STAGE...] [--dry-run]
#
# OUT_DIR    logs, rows (rows.jsonl), pictures, summary.txt; default benchmarks/results/local. What an earlier run left there is
#            replaced; other files stay
# --minutes  total budget (default 8); what does not fit is left out and named, so the stages stand in order of worth;
#            a build without a GPU is not counted
# --only     these stages alone (a name as the summary has it), of what is built already unless build is one of them; another
#            name is refused, and the names that there are are listed
# --dry-run  without a GPU: all that can be run is run, the rest is named
# PYTHON     the interpreter (default: .venv/bin/python if there is one, else python3)
# PEER_PATHS checkouts of rivals that are not on PyPI, separated by colons; what is not there is listed as absent
#
# Ends with 0 if stages ran and none failed, 1 if one failed or none ran, 2 if it was asked for what it cannot do.
#
# A new stage is one line: stage NAME LIMIT_S COMMAND..., or missing NAME REASON where it cannot run.
set -uo pipefail
cd "$(dirname "$0")/.."

refuse() { echo "$*" >&2; exit 2; }

out='' minutes=8 dry=0 only='' listing=0
while [ $# -gt 0 ]; do
  case $1 in
    --minutes) minutes=${2:-}; shift; [ $# -gt 0 ] && shift ;;
    --only) only=${2:-}; [ -n "$only" ] || refuse "--only: expected names of stages"; shift 2 ;;
    --dry-run) dry=1; shift ;;
    -h | --help) sed -n '2,/^# PEER_PATHS/p' "$0" | cut -c3-; exit 0 ;;
    -*) refuse "unknown option $1; see --help" ;;
    '') refuse "OUT_DIR: expected a folder, got an empty name" ;;
    *) [ -z "$out" ] || refuse "expected one OUT_DIR, got $out and $1"; out=$1; shift ;;
  esac
done
out=${out:-benchmarks/results/local}
case $minutes in '' | *[!0-9]* | ???????*) refuse "--minutes: expected a whole number of minutes, got '$minutes'" ;; esac
minutes=$((10#$minutes))
[ "$minutes" -gt 0 ] || refuse "--minutes: expected a whole number from 1 on, got 0"
if [ -z "${PYTHON:-}" ]; then PYTHON=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3); fi
export PYTHONDONTWRITEBYTECODE=1
export PYTHONFAULTHANDLER=1   # a stage that ends by a signal leaves its stack in its log
failed=0 ran=0

say() { echo "$*" | tee -a "$summary"; }
left() { echo $((minutes * 60 - reserve - SECONDS + uncounted)); }
show() { [ $listing = 1 ] || [ ! -f "$out/$1.log" ] || sed 's/^/          /' "$out/$1.log" | tail -n "${2:-40}" | tee -a "$summary"; }
reserve=30   # seconds kept for the pictures and tables at the end
uncounted=0  # seconds that the budget does not count
refusal=''   # if the log of a failing stage matches it, the machine refused: no failure of the code
refused=''   # the same for tools that end with 0 all the same

# stage NAME LIMIT_S COMMAND...: output to OUT_DIR/NAME.log, one line to the summary. Benchmarks and profiles that run out of
# their time are cut short, not failed: the rows that they have measured by then are written.
stage() {
  local name=$1 limit=$2 start=$SECONDS code pattern
  shift 2
  if [ $listing = 1 ]; then echo "$name"; return 0; fi
  wanted "$name" || return 1
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  if [ "$limit" -lt 5 ]; then say "LEFT OUT  $name: the $minutes minutes are spent"; return 1; fi
  timeout -k 10 "$limit" "$@" > "$out/$name.log" 2>&1 < /dev/null
  code=$?
  pattern=$([ $code = 0 ] && echo "$refused" || echo "$refusal")
  if [ -n "$pattern" ] && grep -qiE "$pattern" "$out/$name.log"; then
    say "REFUSED   $name: $(grep -iE "$pattern" "$out/$name.log" | head -n 1 | cut -c1-200)"
    return 1
  fi
  ran=$((ran + 1))
  case $code in
    0) say "ok        $name ($((SECONDS - start)) s)" ;;
    124 | 137)
      say "CUT SHORT $name after $limit s; what it printed is in $name.log"
      case $name in bench-* | ncu) ;; *) failed=1 ;; esac
      ;;
    *)
      say "FAILED    $name (exit $code, $((SECONDS - start)) s): $(tail -n 1 "$out/$name.log" | cut -c1-200)"
      failed=1
      ;;
  esac
  return $code
}
wanted() { [ -z "$only" ] || case ",$only," in *",$1,"*) ;; *) return 1 ;; esac; }
missing() {
  [ $listing = 0 ] || return 0
  local name
  for name in ${1//,/ }; do wanted "$name" && { say "LEFT OUT  $1: $2"; return 0; }; done
}
have() { [ $listing = 1 ] || command -v "$1" > /dev/null 2>&1; }
module() { [ $listing = 1 ] || "$PYTHON" -c "import $1" > /dev/null 2>&1; }

# The stages stand in a function, not indented, so that their names can be listed without running any.
stages() {

# 1. Build in place: with a GPU and nvcc by force with CUDA, for this architecture; else whatever the tools found allow,
# which the next stage prints.
if [ $gpu = 1 ] && have "$nvcc"; then
  export CUDA_HOME=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v "$nvcc")")")")}
  stage build 240 env KAN_FAST_BUILD=cuda TORCH_CUDA_ARCH_LIST="$arch" "$PYTHON" setup.py -q build_ext --inplace
else
  have "$nvcc" || missing build-cuda "no nvcc"
  # Without a GPU nobody waits for the machine: two slow cores may take what they need, and the other stages keep theirs.
  limit=300 start=$SECONDS
  [ $gpu = 1 ] || limit=1200 uncounted=1200
  stage build $limit "$PYTHON" setup.py -q build_ext --inplace
  [ $gpu = 1 ] || uncounted=$((SECONDS - start))
fi
stage info 60 "$PYTHON" -m kan_fast.info && show info

# 2. Right? A small set on every backend, and tensor-core instructions against their twins on the host.
# Three of its shapes: every kernel is compiled at its first call, which takes longer than running it.
stage small-set 150 "$PYTHON" -m benchmarks.gpu.small_set --device $device --first $([ $gpu = 1 ] && echo 3 || echo 2)
if [ "$arch" = 9.0a ] && have "$nvcc"; then
  for kernel in wgmma wgmma_sparse; do
    stage "small-set-$kernel" 60 env KAN_FAST_CUDA_KERNEL=$kernel "$PYTHON" -m benchmarks.gpu.small_set --device cuda --first 3 \
      --dtype bfloat16 float16 --backends native --repeats 20
  done
else
  missing small-set-wgmma,small-set-wgmma_sparse "they need a GPU of compute capability 9.0 and nvcc"
fi
if have "${CXX:-g++}"; then
  stage twins 60 sh -c "${CXX:-g++} -std=c++17 -O1 -o '$out/check_twins' benchmarks/gpu/check_twins.cpp && '$out/check_twins'"
else
  missing twins "no C++ compiler"
fi
for name in probe rates; do
  if ! have "$nvcc"; then missing $name "no nvcc"; continue; fi
  stage "compile-$name" 120 sh -c "'$nvcc' -std=c++20 -O2 $targets -o '$out/$name' benchmarks/gpu/$name.cu" || continue
  if [ $gpu = 0 ]; then missing $name "no GPU; it was compiled only"; continue; fi
  stage $name 60 "$out/$name"
  wanted $name && show $name
done
[ $listing = 0 ] && [ -f "$out/rates.log" ] && grep '^{"what"' "$out/rates.log" >> "$rows"

# 3. Every test that needs a GPU, in several processes.
if ! module pytest; then
  missing gpu-tests "pytest is not installed"
elif [ $gpu = 1 ]; then
  # Those that compile Triton's kernels come later: they are 600 of 1600, and take the most time by far. So do those of
  # clusters: no GPU has run them yet, and who waits for a signal that never comes may take the others' time.
  stage gpu-tests 180 "$PYTHON" -m benchmarks.gpu.run_tests --select "not triton and not cluster" --out "$out"
  wanted gpu-tests && show gpu-tests 24
else
  stage gpu-tests-collect 60 "$PYTHON" -m benchmarks.gpu.run_tests --collect && show gpu-tests-collect 1
  missing gpu-tests "no GPU; they were collected only"
fi

# 4. The benchmarks that matter most.
rivals=()
IFS=: read -ra folders <<< "${PEER_PATHS:-}"
for folder in "${folders[@]}"; do rivals+=(--peer-path "$folder"); done
bench() { local name=$1 limit=$2; shift 2; stage "$name" "$limit" "$PYTHON" -m benchmarks --out "$rows" "${rivals[@]}" "$@"; }
if [ $gpu = 1 ]; then
  for dtype in bfloat16 float32; do
    bench bench-layer-$dtype 60 --device cuda --dtype $dtype --seconds 0.2 --minutes 0.9 --phases forward step \
      --peers linear cox-de-boor efficient-kan inkan fast-kan
  done
  bench bench-latency 25 --device cuda --what latency --seconds 0.3
  bench bench-contractions 25 --device cuda --backend native --what contractions --dtype float32 bfloat16 --seconds 0.05
else
  bench bench-layer 90 --device cpu --threads 1 --shapes 64,16,16,5 --seconds 0.02 --memory --peers cox-de-boor
  bench bench-latency 60 --device cpu --threads 1 --what latency --seconds 0.02
  bench bench-contractions 60 --device cpu --threads 1 --what contractions --shapes 64,16,16,5 --seconds 0.02
  missing bench-cuda,bench-dense,bench-sparse,bench-wgmma,bench-wgmma_sparse "no GPU"
fi

# 5. Sanitizers on three of the shapes, wide and narrow. A machine that refuses them is no failure of the code.
sanitize() {
  refusal='not supported|permission|unable to|internal sanitizer error|ERR_NVGPUCTRPERM'
  stage "$1" 60 compute-sanitizer --tool "$1" --error-exitcode 97 "$PYTHON" -m benchmarks.gpu.small_set \
    --device cuda --first 3 --repeats 0 --dtype float32 --backends native triton
  refusal=''
}
if [ $gpu = 0 ]; then
  missing memcheck,racecheck "no GPU"
elif ! have compute-sanitizer; then
  missing memcheck,racecheck "no compute-sanitizer"
else
  sanitize memcheck
  sanitize racecheck
fi
if [ $gpu = 1 ]; then
  stage bitwise 60 "$PYTHON" -m benchmarks.gpu.small_set --device cuda --repeats 100 --first 3 --dtype float32 bfloat16 \
    --backends native triton
else
  stage bitwise 60 "$PYTHON" -m benchmarks.gpu.small_set --device cpu --repeats 100 --first 1 --dtype float32
fi

# 6. Profile of the main kernels, then whatever time is left for the wider benchmarks.
if [ $gpu = 1 ] && have ncu; then
  refusal=ERR_NVGPUCTRPERM refused=ERR_NVGPUCTRPERM
  sections=(SpeedOfLight SchedulerStats WarpStateStats InstructionStats MemoryWorkloadAnalysis SourceCounters)
  stage ncu 60 ncu --clock-control none "${sections[@]/#/--section=}" --launch-count 12 --kernel-name-base demangled \
    -k 'regex:kan|contract|warpgroup|wide|narrow' --export "$out/ncu" --force-overwrite --page details "$PYTHON" -m benchmarks \
    --device cuda --shapes 4096,1024,1024,5 --dtype bfloat16 --phases step --seconds 0.01 --peers
  refusal='' refused=''
else
  missing ncu "$([ $gpu = 1 ] && echo "not installed" || echo "no GPU")"
fi
if [ $gpu = 1 ]; then
  if [ "$arch" = 9.0a ] && have "$nvcc"; then
    module pytest &&
      stage gpu-tests-cluster 60 "$PYTHON" -m benchmarks.gpu.run_tests --select cluster --out "$out/cluster" &&
      show gpu-tests-cluster 24
    for kernel in wgmma cluster; do
      stage "contractions-$kernel" 30 env KAN_FAST_CUDA_KERNEL=$kernel "$PYTHON" -m benchmarks --what contractions --device cuda \
        --backend native --dtype bfloat16 --shapes 16384,1024,1024,5 4096,1024,1024,5 4096,256,256,5 --seconds 0.1 \
        --out "$out/rows-kernels.jsonl"
    done
  else
    missing gpu-tests-cluster,contractions-wgmma,contractions-cluster "they need a GPU of compute capability 9.0 and nvcc"
  fi
  module pytest &&
    stage gpu-tests-triton 400 "$PYTHON" -m benchmarks.gpu.run_tests --select triton --out "$out/triton"
  wanted gpu-tests-triton && show gpu-tests-triton 24
  # Which of the tensor-core kernels is the fastest here: the rows say which was forced.
  kernels="dense sparse"
  [ "$arch" = 9.0a ] && kernels="$kernels wgmma wgmma_sparse cluster"
  for kernel in $kernels; do
    stage "bench-$kernel" 30 env KAN_FAST_CUDA_KERNEL=$kernel "$PYTHON" -m benchmarks --out "$out/rows-kernels.jsonl" \
      --device cuda --backend native --shapes 16384,1024,1024,5 4096,256,256,5 4096,256,256,20 --dtype bfloat16 --seconds 0.3 \
      --phases forward --peers linear
  done
  stage bench-narrow 40 env KAN_FAST_CUDA_KERNEL=narrow "$PYTHON" -m benchmarks --out "$out/rows-kernels.jsonl" --device cuda \
    --backend native --shapes 65536,2,5,5 1000000,2,5,5 1048576,5,1,5 --dtype float32 bfloat16 --seconds 0.2 \
    --phases forward step --peers linear
  bench bench-memory 90 --device cuda --dtype float32 bfloat16 --phases --memory \
    --peers linear cox-de-boor efficient-kan inkan fast-kan
  bench bench-network 60 --device cuda --what network --seconds 0.5 --peers linear cox-de-boor efficient-kan fast-kan
  bench bench-layer-more 120 --device cuda --dtype float32 --seconds 0.4 --phases optimiser second_derivative \
    --peers cox-de-boor efficient-kan
  bench bench-sweep 240 --device cuda --what sweep --dtype bfloat16 --seconds 0.3 --peers
  if module triton; then
    # What measured tiles gain over those of tiles.py; the tiles themselves stay in OUT_DIR/tiles.
    stage bench-tuned 420 env KAN_FAST_TUNE=1 KAN_FAST_CACHE="$out/tiles" "$PYTHON" -m benchmarks --out "$out/rows-tuned.jsonl" \
      --device cuda --backend triton --shapes 16384,1024,1024,5 4096,256,256,5 --dtype bfloat16 float32 --seconds 0.4 \
      --phases forward step --peers
    bench bench-kernels 240 --device cuda --what kernels
  fi
else
  missing gpu-tests-cluster,contractions-wgmma,contractions-cluster "no GPU"
  missing bench-memory,bench-network,bench-layer-more,bench-sweep,bench-tuned,bench-kernels "no GPU"
fi

# 7. Pictures and tables of these rows.
reserve=0
if module matplotlib; then
  stage plot 60 "$PYTHON" -m benchmarks.plot --rows "$rows" --figures "$out" --no-readme
else
  missing plot "matplotlib is not installed"
fi
}

# The names of all stages, of a GPU with everything that any of them needs and of a machine without one.
names() {
  listing=1 out='' rows=''
  gpu=1 arch=9.0a device=cuda targets='' nvcc=nvcc
  stages
  gpu=0 arch='' device=cpu
  stages
}
known=$(names 2> /dev/null | sort -u)
IFS=', ' read -ra asked <<< "$only"
only=$(IFS=,; echo "${asked[*]}")
for name in "${asked[@]}"; do
  grep -qxF -- "$name" <<< "$known" || refuse "--only: expected any of" $known"; got $name"
done

gpu=$("$PYTHON" -c "import torch; print(int(torch.cuda.is_available()))" 2> /dev/null || echo 0)
if [ "$gpu" != 1 ] && [ $dry = 0 ]; then
  echo "no CUDA device that torch of $PYTHON can use; --dry-run runs what can be run without"
  exit 2
fi
if [ $dry = 1 ]; then
  gpu=0
  export OMP_NUM_THREADS=1   # nothing is measured, and idle threads would only spin
fi

# Nothing is written or deleted before the folder is there; what is deleted are the files of an earlier run, by their names.
mkdir -p -- "$out" && folder=$(CDPATH='' cd -- "$out" && pwd) && [ -w "$folder" ] || refuse "OUT_DIR: cannot write to $out"
out=$folder
summary=$out/summary.txt rows=$out/rows.jsonl
: > "$summary" || refuse "OUT_DIR: cannot write $summary"
rm -f "$rows" "$out/rows-kernels.jsonl" "$out/rows-tuned.jsonl" "$out/nvidia-smi.log" "$out"/gpu-tests-[0-9]*.log
for name in $known; do rm -f "$out/$name.log"; done

nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
have "$nvcc" || nvcc=/usr/local/cuda/bin/nvcc
say "$(date -u +%Y-%m-%dT%H:%MZ), budget $minutes minutes, $([ $gpu = 1 ] && echo "with a GPU" || echo "dry run, no GPU is used")"
have nvidia-smi && [ $gpu = 1 ] && nvidia-smi > "$out/nvidia-smi.log" 2>&1
if [ $gpu = 1 ]; then
  # Only this machine's architecture: a fraction of the time of all of them.
  arch=$("$PYTHON" -c "import torch; a, b = torch.cuda.get_device_capability(); print(f'{a}.{b}' + ('a' if a == 9 else ''))")
  targets="-gencode arch=compute_${arch/./},code=sm_${arch/./}"
else
  arch='' targets="-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a"
fi
device=$([ $gpu = 1 ] && echo cuda || echo cpu)

stages
rm -f "$out/check_twins" "$out/probe" "$out/rates"
if [ $ran = 0 ]; then
  failed=1 said="no stage ran: see above"
elif [ $failed = 0 ]; then
  said="all stages that ran passed"
else
  said="some stages failed: see above"
fi
say "$said ($SECONDS s)"
exit $failed
