#!/usr/bin/env bash
# Builds kdejsd on a machine with a CUDA device, tests it, runs it under compute-sanitizer, times it, and leaves a record.
# Needs no network: torch, numpy, scipy, pytest, pybind11, scikit-build-core, cmake, ninja and the CUDA toolkit are there
# already; Python packages that are not may lie as wheels in .whl/ beside the sources. Takes less than 9 minutes.
#
#   bench/gpu_suite.sh [RECORD]      RECORD: a folder, bench/results/<gpu>-<date> if not given
#
# PYTHON chooses the interpreter (python3); KDEJSD_COMMIT names the commit where there is no git. The exit status is 0 if
# every step passed. A step that fails does not keep the later ones from running.

set -u -o pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
deadline=520 # seconds since the start, for all steps together
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site
export PYTHONPATH=$site:$work/tools PYTHONUNBUFFERED=1 PATH=$PATH:/usr/local/cuda/bin

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader --id=0 2>/dev/null) || gpu=
record=${1:-$root/bench/results/$(tr -c '[:alnum:]\n' - <<<"${gpu:-no-cuda-device}")-$(date +%Y-%m-%d)}
mkdir -p "$record" || exit 1
record=$(cd "$record" && pwd)

summary=()
failed=0

note() { # note pass|FAIL NAME TEXT
  summary+=("$(printf '%-5s%-22s%s' "$1" "$2" "$3")")
  echo "== ${summary[-1]}"
  [[ $1 == pass ]] || failed=1
}

finish() {
  {
    echo "kdejsd on ${gpu:-a machine without a CUDA device}, $(date -u '+%Y-%m-%d %H:%M UTC'), $SECONDS s"
    printf '%s\n' "${summary[@]}"
  } >"$record/summary.txt"
  echo
  cat "$record/summary.txt"
  echo "record: $record"
  exit "$failed"
}

# step NAME SECONDS LOG PATTERN COMMAND...: runs it within the time, its output into the log. It passes if its exit
# status is 0 and some line of its output has the pattern; the last such line stands in the summary.
step() {
  local name=$1 limit=$2 log=$record/$3 pattern=$4 begun=$SECONDS status=0 said
  shift 4
  ((limit > deadline - SECONDS)) && limit=$((deadline - SECONDS))
  if ((limit < 5)); then
    note FAIL "$name" "no time left"
    return 1
  fi
  echo "== $name: up to $limit s"
  printf '\n$ %s\n' "$*" >>"$log"
  timeout --kill-after=10 "$limit" "$@" >"$work/output" 2>&1 || status=$?
  cat "$work/output" >>"$log"
  said=$(grep -E -- "$pattern" "$work/output" | tail -n 1)
  if ((status == 124 || status == 137)); then
    note FAIL "$name" "stopped after $limit s, see ${log##*/}"
  elif ((status != 0)) || [[ -z $said ]]; then
    note FAIL "$name" "exit status $status, see ${log##*/}${said:+: $said}"
    grep -E '[Ee]rror|FAILED' "$work/output" | head -n 12
  else
    note pass "$name" "$((SECONDS - begun)) s: $said"
    return 0
  fi
  return 1
}

rm -f "$record"/{environment.json,build.log,resources.txt,tests.log,sanitizer.log,bench.txt,bench.csv,bench_*.txt,bench_*.csv,summary.txt}

# ---------------------------------------------------------------------------------------------------------------------
# What is here

missing() { # the packages, of those given, that Python does not find
  "$python" - "$@" <<'PYTHON'
import importlib.util, sys
print(" ".join(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
PYTHON
}

absent=$(missing torch numpy scipy pytest pybind11 scikit_build_core)
if [[ -n $absent ]] && compgen -G "$root/.whl/*.whl" >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/tools" "$root"/.whl/*.whl
  absent=$(missing torch numpy scipy pytest pybind11 scikit_build_core)
fi
if [[ -n $absent ]]; then
  note FAIL environment "Python packages missing ($("$python" --version)): $absent; install them, or put wheels into .whl/"
  finish
fi

cat >"$work/environment.py" <<'PYTHON'
import importlib.metadata, json, platform, subprocess, sys

def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"not found ({type(error).__name__})"

query = "name,compute_cap,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
found = {"gpu": said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")}
found["nvcc"] = said("nvcc", "--version").splitlines()[-1]
found["compute-sanitizer"] = said("compute-sanitizer", "--version").splitlines()[-1]
found["cmake"] = said("cmake", "--version").splitlines()[0]
found["ninja"] = said("ninja", "--version")
found["compiler"] = said("c++", "--version").splitlines()[0]
found["python"] = platform.python_version()
for package in ("torch", "triton", "numpy", "scipy", "pytest", "pybind11", "scikit-build-core", "pykeops", "torch-kde"):
    try:
        found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found[package] = "not installed"
import torch
found["torch CUDA"] = torch.version.cuda
found["torch sees"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
json.dump(found, open(sys.argv[1], "w"), indent=2)
for item in found.items():
    print("%-18s%s" % item)
PYTHON
step environment 60 build.log '^torch sees' "$python" "$work/environment.py" "$record/environment.json"

# ---------------------------------------------------------------------------------------------------------------------
# Build, for the architecture of this device; without one, for one that shows whether it builds

capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0 2>/dev/null | tr -d .)
export CUDAARCHS=${CUDAARCHS:-${capability:-90}} KDEJSD_CUDA=ON
build() {
  step build 150 build.log '^Successfully installed' "$python" -m pip install -v --no-index \
    --no-deps --no-build-isolation --no-cache-dir --target "$site" -C build-dir="$work/build" "$root"
}
build || finish
"$root/bench/cuda_resources.sh" "${capability:-90}" | tee "$record/resources.txt"
unset CUDAARCHS KDEJSD_CUDA

cd "$work" || exit 1 # not the sources' folder, whose kdejsd/ is not what was built
if ! problem=$("$python" -c 'from kdejsd._native import cuda_problem; print(cuda_problem())') || [[ -n $problem ]]; then
  note FAIL device "no CUDA device to go on with: ${problem:-kdejsd cannot be imported}"
  finish
fi

# ---------------------------------------------------------------------------------------------------------------------
# Tests

mapfile -t tests < <(grep -l cuda "$root"/python_tests/test_*.py | grep -v on_host)
step tests 150 tests.log '[0-9]+ passed' "$python" -m pytest -q -rs -k cuda -p no:cacheprovider \
  --rootdir "$root" -c "$root/pyproject.toml" "${tests[@]}"

# ---------------------------------------------------------------------------------------------------------------------
# compute-sanitizer, on a small run of every op in all its forms

cat >"$work/all_passes.py" <<'PYTHON'
import itertools
import torch
import kdejsd
from kdejsd import reference

torch.manual_seed(0)
for (n, m, dim), dtype in itertools.product(((1, 1, 1), (33, 257, 3), (70, 1500, 8), (5, 130, 65)), (torch.float32, torch.float64)):
    for per_center, exclude in ((False, False), (True, True)):
        query, centers = torch.randn(2, n, dim, dtype=dtype), torch.randn(2, m, dim, dtype=dtype)
        h = (torch.rand(2, m if per_center else 1, dtype=dtype) + 0.5)
        weights = torch.randn(2, m, dtype=dtype).log_softmax(-1) if per_center else None
        out = torch.randint(-1, m, (2, n)) if exclude and m > 1 else False
        found = []
        for device, to, module in (("cuda", dtype, kdejsd), ("cpu", torch.float64, reference.kde)):
            inputs = [t.to(device, to).requires_grad_() for t in (query, centers, h) + (() if weights is None else (weights,))]
            kde = {"log_weights": inputs[3] if weights is not None else None, "exclude_self": out.to(device) if exclude and m > 1 else False}
            log_prob = module.kde_log_prob(*inputs[:3], **kde)
            gradients = torch.autograd.grad(log_prob.sin().sum(), inputs)
            loss = module.jsd_loss(*inputs[:3], **kde)
            gradients += torch.autograd.grad(loss, inputs[0])
            found.append([t.detach().cpu().double() for t in (log_prob, loss, *gradients)])
        tolerance = 2e-4 if dtype == torch.float32 else 1e-9
        for ours, truth in zip(*found):
            torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance * (1 + truth.abs().max().item()))
# Gradients for queries and one bandwidth alone, as in training: on tensor cores from l = 16 on.
for (n, m, dim), precision in itertools.product(
    ((1, 1, 16), (33, 257, 40), (150, 700, 65), (20, 130, 200), (70, 300, 17)), ("highest", "high", "medium")
):
    torch.set_float32_matmul_precision(precision)
    for options in ({}, {"exclude_self": torch.arange(n) % m - 1}, {"log_weights": torch.randn(m).log_softmax(-1)}):
        query, centers, h = torch.randn(n, dim), torch.randn(m, dim), torch.tensor(0.5 + 0.15 * dim**0.5)
        if m == 1 and options:
            continue
        found = []
        for device, to, module in (("cuda", torch.float32, kdejsd), ("cpu", torch.float64, reference.kde)):
            z, c, b = query.to(device, to).requires_grad_(), centers.to(device, to), h.to(device, to).requires_grad_()
            kde = {k: v.to(device, to) if v.is_floating_point() else v.to(device) for k, v in options.items()}
            log_prob = module.kde_log_prob(z, c, b, **kde)
            gradients = torch.autograd.grad(log_prob.sum(), (z, b))
            gradients += torch.autograd.grad(module.jsd_loss(z, c, b.detach(), **kde), z)
            found.append([t.detach().cpu().double() for t in (log_prob, *gradients)])
        tolerance = 2e-5 if precision == "highest" else 5e-3
        for ours, truth in zip(*found):
            torch.testing.assert_close(ours, truth, rtol=0, atol=tolerance * (1 + truth.abs().max().item()))
torch.set_float32_matmul_precision("highest")
for dtype in (torch.float32, torch.float64):
    tolerance = 2e-4 if dtype == torch.float32 else 1e-9

    def same(function, *shapes, **options):
        inputs = [make(*shape).to(dtype) for make, *shape in shapes]
        found = []
        for device, to, module in (("cuda", dtype, kdejsd), ("cpu", torch.float64, reference)):
            leaves = [t.to(device, to).requires_grad_() for t in inputs]
            value = getattr(module, function)(*leaves, **options)
            value = value.value if options.get("reduction") == "max" else value
            found.append([value, *torch.autograd.grad(value.sin().sum(), leaves)])
        for ours, truth in zip(*found):
            truth = truth.detach()
            torch.testing.assert_close(ours.detach().cpu().double(), truth, rtol=tolerance,
                                       atol=tolerance * (1 + truth.abs().max().item()))

    for b, d, l in ((2, 1, 1), (70, 33, 5), (300, 130, 3)):
        for pairs, reduction in itertools.product(("halves", "all"), ("sum", "max", "none")):
            same("omega", (torch.randn, b, d), (torch.randn, b, l), pairs=pairs, reduction=reduction)
    for rows, classes in ((1, 2), (5, 70), (3, 5000)):
        same("class_radius_bound", (lambda *shape: torch.rand(*shape).softmax(-1), rows, classes))
    for count, d in ((1, 1), (70, 2), (1500, 10), (300, 130)):
        latents, labels = torch.randn(count, d, dtype=dtype), torch.arange(count) % 3
        ours = kdejsd.nearest_other_class(latents.cuda(), labels.cuda())
        truth = reference.nearest_other_class(latents.double(), labels)
        torch.testing.assert_close(ours.distance.cpu().double(), truth.distance, rtol=tolerance, atol=0)
torch.cuda.synchronize()
print("all passes agree with the reference")
PYTHON
step "all passes" 60 sanitizer.log 'agree with the reference' "$python" "$work/all_passes.py"
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1" 75 sanitizer.log 'SUMMARY:' \
    compute-sanitizer --tool "$1" --error-exitcode 9 "$python" "$work/all_passes.py"
}
sanitize memcheck
sanitize racecheck

# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks

step benchmarks 240 bench.txt '^n = 1024' "$python" "$root/bench/bench_kde.py" --device cuda --csv "$record/bench.csv" \
  --budget 40
for op in omega radius nearest; do
  step "benchmark $op" 60 "bench_$op.txt" '^ +kdejsd' "$python" "$root/bench/bench_$op.py" --device cuda --quick \
    --csv "$record/bench_$op.csv"
done
sanitize initcheck # last: they matter least where time is short
sanitize synccheck
cat "$record/bench.txt" 2>/dev/null
finish
