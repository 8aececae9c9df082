#!/usr/bin/env bash
# Tries kdejsd on a machine with a CUDA device, the most telling steps first, and leaves a record; usage is below.

set -u -o pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tools=$root/bench/gpu_suite_tools.py
stages=(environment first-light bench profile tests sanitizers tuning ops density compiled checks)

usage() {
  cat <<USAGE
bench/gpu_suite.sh [--out FOLDER] [--until STAGE] [--only STAGE,...] [--seconds N] [--prebuilt FOLDER]
                   [--wheels FOLDER] [--dry-run]
bench/gpu_suite.sh --prebuild [FOLDER]

Tries kdejsd on a machine with a CUDA device, in stages, each with a limit of its own:

  environment   what is here; takes the compiled module that was brought along, or builds one for this device
  first-light   every op, dtype and path against float64, a line each (python_tests/cuda_first_light.py)
  bench         six sizes of bench_kde.py
  profile       the kernels of five dimensions under ncu
  tests         the tests that have a CUDA device
  sanitizers    memcheck and racecheck, on few and small inputs
  tuning        bench_kde.py with other choices of kernels, warps, splits
  ops           the benchmarks of omega, the class radius and the nearest sample
  density       five sizes of bench_density.py; needs scikit-learn
  compiled      the peers that compile first
  checks        initcheck and synccheck

--out       the record's folder, bench/results/<gpu>-<date> if not given: environment.txt, first_light.txt, bench.txt,
            bench.csv, tests.txt, summary.txt, and the rest in logs.tar.gz. All is written while a step runs; whenever
            the suite is stopped, what was found until then is there.
--until     stops after this stage
--only      these stages, after environment
--seconds   for all of it, 560 if not given; a step that the time does not suffice for is cut short
--prebuilt  where a compiled module may lie that was built before, prebuilt/ if not given. It is taken if it is of these
            sources, for this Python and this device; else one is built, which takes a minute.
--wheels    where wheels of Python packages may lie that are missing here, .whl/ if not given
--dry-run   environment, first-light, bench, tests and density against the CPU, with small inputs; the tests are only
            collected
--prebuild  builds that module, for Python 3.12 and sm_90, and ends. PYTHON312 names the interpreter, CUDAARCHS another
            architecture. Needs nvcc; an index of packages, unless the interpreter has those that a build takes.

PYTHON chooses the interpreter (python3). It needs torch, numpy and scipy, for the tests pytest and hypothesis, and to
build without a network pybind11, scikit-build-core and cmake. A step that fails does not keep the later ones from
running; the exit status is 0 if every step passed.
USAGE
}

die() {
  echo "gpu_suite.sh: $*" >&2
  exit 2
}

# ---------------------------------------------------------------------------------------------------------------------
# Arguments

out='' until='' only='' budget=560 prebuilt=$root/prebuilt wheels=$root/.whl device=cuda prebuild=''
while (($#)); do
  case $1 in
    --help | -h) usage && exit ;;
    --dry-run) device=cpu ;;
    --prebuild)
      prebuild=yes
      [[ ${2:-} == -* || -z ${2:-} ]] || { prebuilt=$2 && shift; }
      ;;
    --out | --until | --only | --seconds | --prebuilt | --wheels)
      (($# > 1)) || die "$1 needs a value"
      case $1 in
        --out) out=$2 ;;
        --until) until=$2 ;;
        --only) only=$2 ;;
        --seconds) budget=$2 ;;
        --prebuilt) prebuilt=$2 ;;
        --wheels) wheels=$2 ;;
      esac
      shift
      ;;
    *) die "unknown argument $1; --help says what there is" ;;
  esac
  shift
done
IFS=, read -r -a chosen <<<"$only"
for stage in "${until:-environment}" "${chosen[@]}"; do
  [[ $stage =~ ^[a-z-]+$ && " ${stages[*]} " == *" $stage "* ]] || die "there is no stage $stage; they are ${stages[*]}"
done
[[ $budget =~ ^[1-9][0-9]{0,4}$ ]] || die "--seconds must be a whole number from 1 to 99999, got $budget"
prebuilt=$(realpath -m "$prebuilt") # the stages run in another folder
python=$(command -v "${PYTHON:-python3}") || die "there is no ${PYTHON:-python3}; PYTHON names the interpreter"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH=$PATH:/usr/local/cuda/bin PYTHONUNBUFFERED=1

# built_into FOLDER PYTHON OPTION...: kdejsd as a user installs it, with the CUDA kernels.
built_into() {
  KDEJSD_CUDA=ON "$2" -m pip install -q --no-deps --no-cache-dir --disable-pip-version-check --root-user-action ignore \
    --target "$1" -C build-dir="$work/build" "${@:3}" "$root"
}

# ---------------------------------------------------------------------------------------------------------------------
# A compiled module to bring along

if [[ $prebuild ]]; then
  for python in ${PYTHON312:-python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python}; do
    found=$("$python" -c 'import platform; print(platform.python_version())' 2>/dev/null) && break
  done
  [[ $found == 3.12.* ]] ||
    die "--prebuild needs Python 3.12, ${PYTHON312:-python3.12} is ${found:-not here}; PYTHON312 names its interpreter"
  "$python" -m pip --version >/dev/null || die "$python has no pip"
  command -v nvcc >/dev/null || die "--prebuild needs nvcc, which is not on PATH or in /usr/local/cuda/bin"
  export CUDAARCHS=${CUDAARCHS:-90-real}
  lacking=$("$python" "$tools" lacking build)
  echo "building for Python $found and $CUDAARCHS with $(nvcc --version | tail -n 1)"
  if [[ $lacking ]]; then
    echo "with packages from an index, since $python lacks these:"$'\n'"$lacking"
    isolation=()
  else
    isolation=(--no-build-isolation)
  fi
  sources=$("$python" "$tools" sources)
  built_into "$work/site" "$python" "${isolation[@]}" || die "the build failed"
  strip "$work"/site/kdejsd/_C*.so
  "$python" "$tools" seal "$work/site" "$CUDAARCHS" "$sources" || die "the module is not to be used"
  rm -rf "$prebuilt/kdejsd" "$prebuilt/prebuilt.json"
  # Without the Python files: they are those of the sources, wherever it is used.
  if ! { mkdir -p "$prebuilt/kdejsd" && cp "$work"/site/kdejsd/_C*.so "$prebuilt/kdejsd/" &&
    cp "$work/site/prebuilt.json" "$prebuilt/"; }; then
    die "$prebuilt cannot be written to"
  fi
  echo "$prebuilt: $(du -sh "$prebuilt" | cut -f 1), $SECONDS s"
  exit
fi

# ---------------------------------------------------------------------------------------------------------------------
# The record

ask_gpu() { # ask_gpu FIELD: what nvidia-smi says of the first device
  nvidia-smi --query-gpu="$1" --format=csv,noheader --id=0 2>/dev/null
}
gpu=$(ask_gpu name) || gpu=
capability=$(ask_gpu compute_cap) || capability=
machine=$gpu
[[ $device == cuda ]] || machine="the CPU, a dry run"
out=${out:-$root/bench/results/$(tr -c '[:alnum:]\n' - <<<"${machine:-no-cuda-device}")-$(date +%Y-%m-%d)}
mkdir -p -- "$out" || die "$out cannot be made"
out=$(cd -- "$out" && pwd)
rm -f "$out"/{environment.txt,first_light.txt,bench.txt,bench.csv,tests.txt,summary.txt,logs.tar.gz,logs.tar.gz.part}
logs=$work/logs # what is too much, or too little looked at, for a file of its own
mkdir "$logs"

summary=()
failed=0
running=the\ start child='' stage_end=$budget

note() { # note pass|skip|FAIL NAME TEXT
  summary+=("$(printf '%-5s%-24s%s' "$1" "$2" "$3")")
  echo "== ${summary[-1]}"
  [[ $1 == FAIL ]] && failed=1
  {
    echo "kdejsd on ${machine:-a machine without a CUDA device}, $(date -u '+%Y-%m-%d %H:%M UTC'), $SECONDS of $budget s"
    printf '%s\n' "${summary[@]}"
  } >"$work/summary.txt"
  replace summary.txt cp "$work/summary.txt"
}

pack() {
  replace logs.tar.gz tar -C "$work" -cz logs -f
}

# replace NAME COMMAND...: a file of the record by what the command writes to its last argument, at once or not at all.
replace() {
  if ! { "${@:2}" "$out/$1.part" && mv -T "$out/$1.part" "$out/$1"; }; then
    echo "gpu_suite.sh: $out/$1 cannot be written" >&2
    failed=1
  fi
}

finish() {
  pack
  for file in first_light.txt tests.txt; do
    [[ -f $out/$file ]] && grep -a '^FAIL' "$out/$file" | cut -c 1-300 | head -n 20
  done
  grep -av '^\$ ' "$out/bench.txt" 2>/dev/null | cut -c 1-200 | tail -n 60
  echo
  cat "$out/summary.txt"
  echo "record: $out"
  exit "$failed"
}

stopped() {
  trap - TERM INT HUP
  [[ $child ]] && kill -TERM "$child" 2>/dev/null
  note FAIL "$running" "stopped from outside"
  finish
}
trap stopped TERM INT HUP

# step NAME SECONDS LOG PATTERN COMMAND...: runs it within the time, its output into the log. It passes if its exit
# status is 0 and some line of its output has the pattern; the last such line stands in the summary.
step() {
  local name=$1 limit=$2 log=$3 pattern=$4 begun=$SECONDS status=0 before said last=$stage_end
  shift 4
  ((last > budget)) && last=$budget
  ((limit > last - SECONDS)) && limit=$((last - SECONDS))
  if ((limit < 3)); then
    note FAIL "$name" "no time left"
    return 1
  fi
  running=$name
  echo "== $name: up to $limit s"
  printf '\n$ %s\n' "$*" >>"$log"
  before=$(stat -c %s "$log")
  # In the background, since bash sees to a signal only when what runs in the foreground has ended.
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 &
  child=$!
  wait "$child" || status=$?
  child=
  tail -c "+$((before + 1))" "$log" >"$work/output"
  said=$(grep -aE -- "$pattern" "$work/output" | tail -n 1 | cut -c 1-200)
  if ((status == 124 || status == 137)); then
    note FAIL "$name" "stopped after $limit s, see ${log##*/}${said:+: $said}"
  elif ((status != 0)) || [[ -z $said ]]; then
    note FAIL "$name" "exit status $status, see ${log##*/}${said:+: $said}"
    grep -aE '[Ee]rror|FAIL' "$work/output" | head -n 12 | cut -c 1-300
  else
    note pass "$name" "$((SECONDS - begun)) s: $said"
  fi
  pack
  [[ ${summary[-1]} == pass* ]]
}

# ---------------------------------------------------------------------------------------------------------------------
# The stages

suite_environment() {
  local lacking reason
  if compgen -G "$wheels/*.whl" >/dev/null; then
    step wheels 60 "$out/environment.txt" '^Successfully installed' "$python" -m pip install --no-index --no-deps \
      --no-compile --disable-pip-version-check --target "$work/tools" "$wheels"/*.whl
  fi
  # The Python files are those of these sources, also where another kdejsd is installed; the package finds its compiled
  # module in any folder of this path.
  export PYTHONPATH=$root:$work/site:$work/tools:$root/bench${PYTHONPATH:+:$PYTHONPATH}
  cd "$work" || die "$work cannot be entered" # not the sources' folder, or Python would look for modules there first
  step environment 60 "$out/environment.txt" '^python ' "$python" "$tools" environment
  lacking=$("$python" "$tools" lacking run)
  if [[ $lacking ]]; then
    note FAIL packages "${lacking//$'\n'/; }"
    return 1
  fi
  if [[ $device == cpu ]]; then
    step module 60 "$out/environment.txt" 'is usable on' "$python" "$tools" module cpu
    return
  fi
  if [[ -z $gpu ]]; then
    note FAIL device "no CUDA device to go on with; --dry-run does what a CPU can do"
    return 1
  fi
  if ! reason=$("$python" "$tools" refusal "$prebuilt" "$capability"); then
    reason="what it is for cannot be read"
  fi
  if [[ -z $reason ]]; then
    ln -s "$prebuilt" "$work/site"
    cat "$prebuilt/prebuilt.json" >>"$out/environment.txt"
    step "prebuilt module" 60 "$out/environment.txt" 'is usable on' "$python" "$tools" module cuda && return
    rm "$work/site"
  else
    note skip "prebuilt module" "not taken: $reason"
  fi
  lacking=$("$python" "$tools" lacking build)
  if [[ $lacking ]]; then
    note FAIL build "${lacking//$'\n'/; }; install them, or put wheels into $wheels"
    return 1
  fi
  stage_end=$((SECONDS + 180))
  export -f built_into # timeout runs programs alone
  export root work
  # shellcheck disable=SC2016
  CUDAARCHS=${CUDAARCHS:-${capability//./}-real} step build 150 "$out/environment.txt" '^built' \
    bash -c 'built_into "$work/site" "$@" && echo "built in $SECONDS s"' bash "$python" --no-index --no-build-isolation &&
    step module 60 "$out/environment.txt" 'is usable on' "$python" "$tools" module cuda
}

suite_first-light() {
  local options=(--device "$device")
  [[ $device == cpu ]] && options+=(--quick)
  step "first light" 60 "$out/first_light.txt" '^first light:' \
    "$python" "$root/python_tests/cuda_first_light.py" "${options[@]}"
}

# benchmark NAME SECONDS SCRIPT OPTION...: the table goes to bench.txt; --csv is for the options to name.
benchmark() {
  step "$1" "$2" "$out/bench.txt" '^ +kdejsd ' "$python" "$root/bench/$3" --device "$device" "${@:4}"
}

suite_bench() {
  if [[ $device == cpu ]]; then
    benchmark bench 60 bench_kde.py --sizes 7,50,3 33,300,40 --providers gemm attention --threads 1 --budget 0.5 \
      --fma-gflops 100 --gexp 10 --csv "$out/bench.csv"
    return
  fi
  benchmark bench 110 bench_kde.py --graph --budget 30 --csv "$out/bench.csv" --providers gemm attention flash-sinkhorn \
    --sizes 100,10000,8 300,10000,8 4096,4096,2 512,100000,40 1024,1000000,64 512,100000,256
}

suite_profile() {
  if ! command -v ncu >/dev/null; then
    note skip profile "ncu is not here"
    return
  fi
  local sections=(LaunchStats Occupancy SpeedOfLight SchedulerStats WarpStateStats InstructionStats MemoryWorkloadAnalysis)
  local dim
  for dim in 40 256 8 64 2; do # the most telling first
    if ! step "ncu, l = $dim" 25 "$logs/profile.txt" '^ *Duration' \
      ncu --clock-control none --profile-from-start off --target-processes all --kernel-name-base demangled \
      --kernel-name regex:kdejsd "${sections[@]/#/--section=}" \
      "$python" "$root/bench/gpu_suite_launch.py" 512 100000 "$dim"; then
      grep -aq ERR_NVGPUCTRPERM "$work/output" && break # as the next dimensions would
    fi
  done
}

suite_tests() {
  local lacking files options=(-q --no-header -p no:cacheprovider -p gpu_suite_pytest --continue-on-collection-errors)
  lacking=$("$python" "$tools" lacking tests)
  if [[ $lacking ]]; then
    note FAIL tests "${lacking//$'\n'/; }"
    return
  fi
  mapfile -t files < <("$python" "$tools" tests)
  options+=(-k cuda --rootdir "$root" -c "$root/pyproject.toml")
  if [[ $device == cpu ]]; then
    step tests 120 "$out/tests.txt" 'tests collected' "$python" -m pytest "${options[@]}" --collect-only "${files[@]}"
    return
  fi
  if "$python" -c 'import xdist' 2>/dev/null; then
    options+=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  fi
  step tests 130 "$out/tests.txt" 'tests ran: [1-9][0-9]* passed' "$python" -m pytest "${options[@]}" "${files[@]}"
}

# sanitize TOOL OPTION...: on this project's kernels alone, whose names all have its namespace in them.
sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    note skip "$1" "compute-sanitizer is not here"
    return
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1" 60 "$out/tests.txt" 'SUMMARY:' \
    compute-sanitizer --tool "$1" --kernel-name kns=kdejsd --error-exitcode 9 --launch-timeout 60 "${@:2}" \
    "$python" "$root/python_tests/cuda_first_light.py" --quick
}

suite_sanitizers() {
  sanitize memcheck --report-api-errors explicit
  sanitize racecheck
}

suite_tuning() {
  benchmark "tuning, small l" 50 bench_kde.py --graph --budget 12 --csv "$logs/tuning_small_l.csv" --providers kdejsd \
    --tune tensor_from=1,2,5,9,16 --sizes 300,10000,8 4096,4096,2 512,100000,1 512,100000,2 512,100000,4 512,100000,8 \
    512,100000,12
  benchmark "tuning, large l" 40 bench_kde.py --graph --budget 8 --csv "$logs/tuning_large_l.csv" --providers kdejsd \
    --tune tensor_warps=4,8 --sizes 512,100000,40 512,100000,16 512,100000,256 1024,1000000,64
  benchmark "tuning, splits" 40 bench_kde.py --graph --budget 8 --csv "$logs/tuning_splits.csv" --providers kdejsd \
    --tune splits=1,8,33,66,132,264 --sizes 100,10000,8 512,100000,40 512,100000,256
  # The kernel of large l, without the tensor cores, for those that are taken as they come.
  KDEJSD_CUDA_TENSOR_FROM=257 step "first light, no tensor" 40 "$out/first_light.txt" '^first light:' \
    "$python" "$root/python_tests/cuda_first_light.py" --only kde
}

suite_ops() {
  for op in omega radius nearest; do
    benchmark "bench $op" 40 "bench_$op.py" --quick --csv "$logs/bench_$op.csv"
  done
}

suite_density() {
  local lacking
  lacking=$("$python" "$tools" lacking density)
  if [[ $lacking ]]; then
    note skip density "$lacking"
    return
  fi
  if [[ $device == cpu ]]; then
    benchmark "bench density" 60 bench_density.py --sizes 200,16 300,2 --providers sklearn scipy --threads 1 \
      --budget 0.1 --csv "$logs/bench_density.csv"
    return
  fi
  benchmark "bench density" 60 bench_density.py --budget 0.3 --csv "$logs/bench_density.csv" \
    --sizes 10000,16 100000,16 10000,8 10000,1 10000,64
}

suite_compiled() {
  benchmark "bench compiled peers" 100 bench_kde.py --budget 10 --csv "$logs/bench_compiled.csv" \
    --providers "gemm compiled" "stream compiled" pykeops --sizes 512,100000,40 300,10000,8
}

suite_checks() {
  sanitize initcheck
  sanitize synccheck
}

# ---------------------------------------------------------------------------------------------------------------------

declare -A limits=(
  [environment]=90 [first-light]=60 [bench]=110 [profile]=70 [tests]=130 [sanitizers]=110 [tuning]=120 [ops]=80
  [density]=60 [compiled]=100 [checks]=110
)
for stage in "${stages[@]}"; do
  if [[ -z $only || ",environment,$only," == *",$stage,"* ]]; then
    stage_end=$((SECONDS + limits[$stage]))
    if [[ $device == cpu && ! $stage =~ ^(environment|first-light|bench|tests|density)$ ]]; then
      note skip "$stage" "needs a CUDA device"
    else
      "suite_$stage"
      [[ $stage == environment && ${summary[-1]} == FAIL* ]] && finish # nothing can be run
    fi
  fi
  [[ $stage == "$until" ]] && break
done
finish
