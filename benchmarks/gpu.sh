#!/usr/bin/env bash
# All benchmarks that say something about speed and memory, one after the other, into one report. For a machine with a
# GPU (pip install -e '.[dev,cuda]'); without one it says so and measures the CPU.
#
#   benchmarks/gpu.sh                        the whole report, runs/gpu/report.md
#   benchmarks/gpu.sh estimator models       only these
#   LIMIT=300 OUT=/tmp/report benchmarks/gpu.sh
#
# LIMIT: seconds that a benchmark may take (default 1800): one that takes longer, fails, or wants a package that is not
# there is told in the report, and the next one follows. PYTHON: the interpreter (default .venv/bin/python).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
limit=${LIMIT:-1800}
out=${OUT:-runs/gpu}
mkdir -p "$out"
report="$out/report.md"
export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}

declare -A arguments=(
    [estimator]="" [models]="" [parts]="" [prefix]="" [per_example]="" [peers]="" [population]="--models=20M"
    [ledger]="" [precision]="" [cosine]="--per-second" [learning]="--methods=feedback,block_local,backprop --seeds=0 --out=$out/learning.jsonl --figure=$out/learning.png"
    [finetune]="--methods=zo_lora,fo_lora --seeds=0 --out=$out/finetune"
)
order=(estimator models parts prefix per_example peers population ledger precision cosine learning finetune)
chosen=("$@")
[[ ${#chosen[@]} -gt 0 ]] || chosen=("${order[@]}")
for name in "${chosen[@]}"; do
    if [[ ! -v "arguments[$name]" ]]; then
        echo "must be of ${order[*]}; got $name" >&2
        exit 2
    fi
done

{
    echo "# Benchmarks"
    echo
    "$python" - <<'PY'
import platform, jax, jaxlib
devices = jax.devices()
print(f"- {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {platform.machine()}, Python {platform.python_version()}")
print(f"- jax {jax.__version__}, jaxlib {jaxlib.__version__}")
PY
    echo "- commit $(git describe --always --dirty 2>/dev/null || echo unknown), $(date -u +%Y-%m-%dT%H:%MZ)"
    command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | sed 's/^/- /'
} | tee "$report"

for name in "${chosen[@]}"; do
    read -ra options <<<"${arguments[$name]}"
    {
        echo
        echo "## python benchmarks/$name.py ${options[*]-}"
        echo
    } | tee -a "$report"
    begin=$SECONDS
    timeout "$limit" "$python" "benchmarks/$name.py" "${options[@]}" >"$out/$name.log" 2>"$out/$name.err"
    code=$?
    cat "$out/$name.log" | tee -a "$report"
    if [[ $code -eq 124 ]]; then
        echo "(stopped after $limit seconds)"
    elif [[ $code -ne 0 ]]; then
        echo "(exit code $code: $(tail -n 1 "$out/$name.err"))"
    else
        echo "($((SECONDS - begin)) seconds)"
    fi | tee -a "$report"
done
echo
echo "wrote $report"
