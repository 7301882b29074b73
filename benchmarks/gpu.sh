#!/usr/bin/env bash
# All that is worth doing on a machine with a GPU for a short time: builds in place, tests, checks, probes and measures.
# Needs Python with torch, pytest and whatever else a stage names, and no network. Try `benchmarks/gpu.sh --help`.
# shellcheck disable=SC2329 # stages are called by name
set -u

# The order is that of worth, for when the time ends early. Nothing works without the build; a speed counts for nothing before
# the tests and the sanitizer have passed. Then whole networks, which are what is claimed, and modules, which say where the
# time goes, against peers that need no compiling. The probes decide designs to come. torch.compile's providers take minutes
# to build for a few rows, and training has no kernels of ours that inference has not.
#
# A stage with a limit gets so many seconds. The others share what is then left by their weights, so what one stage spares the
# later ones get: of 540 s some 370 go to measuring when the first three are quick, and of more time nearly all the rest.
#       stage          least  limit  weight
STAGES='build              5    150       0
        tests             10     75       0
        sanitizer         20     90       0
        bench-nets        40      0       4
        bench-modules     40      0       3
        probes            10     60       0
        bench-compile     90      0       2
        bench-training    40      0       1'
RESERVE=10    # seconds for the summary and for what must be killed
GRACE=5       # seconds between asking a command to end and killing it
LOG_BYTES=200000
FOUND=86      # compute-sanitizer's exit code when it found something
OUR_KERNELS=googlenet_fused    # in the mangled name of every GPU kernel of this package
PROBES='e1_wgmma_shift e2_sync_latency e5_weight_multicast'
QUICK_PEERS='eager channels_last merged_cudnn'

names_of_stages() {
    local name rest
    while read -r name rest; do printf '%s%s' "${1:-}" "$name"; set -- ,; done <<<"$STAGES"
}

usage() {
    cat <<EOF
usage: benchmarks/gpu.sh [--budget SECONDS] [--stages NAME,...] [--output FOLDER] [--commit HASH] [--python PYTHON]

Builds in place, tests, checks and measures on a machine with a GPU, within a time budget. Without a GPU only the build
and what merely compiles run.

  --budget SECONDS  for everything together, from 30 to 99999 (default: 540)
  --stages NAME,... what to run, in this order (default: $(names_of_stages))
  --output FOLDER   where all results go (default: gpu-output); a results.json there is added to, if it is of this machine
                    and commit, and all else is replaced
  --commit HASH     the commit to record, where the checkout is a copy without .git
  --python PYTHON   the interpreter that has torch (default: that of .venv, else python, else python3)

Exit status: 0, 1 if a stage failed or timed out, 2 for wrong arguments, 130 if interrupted.
EOF
}

refuse() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

field() { # STAGE COLUMN: a number of the table above
    local name least limit weight
    while read -r name least limit weight; do
        if [ "$name" = "$1" ]; then
            case $2 in least) echo "$least" ;; limit) echo "$limit" ;; weight) echo "$weight" ;; esac
            return 0
        fi
    done <<<"$STAGES"
    return 1
}

# Arguments.

BUDGET=540 OUTPUT=gpu-output COMMIT='' PYTHON='' WANTED=$(names_of_stages)
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --budget | --stages | --output | --commit | --python)
            [ $# -ge 2 ] && [ -n "$2" ] || refuse "$1 needs a value: see benchmarks/gpu.sh --help"
            case $1 in
                --budget) BUDGET=$2 ;;
                --stages) WANTED=$2 ;;
                --output) OUTPUT=$2 ;;
                --commit) COMMIT=$2 ;;
                --python) PYTHON=$2 ;;
            esac
            shift 2
            ;;
        *) refuse "unknown argument '$1': choose from --budget, --stages, --output, --commit, --python and --help" ;;
    esac
done
case $BUDGET in
    0* | *[!0-9]* | ? | ??????*) BUDGET_OK='' ;;
    *) BUDGET_OK=$((BUDGET >= 30)) ;;
esac
[ "$BUDGET_OK" = 1 ] || refuse "--budget must be a whole number of seconds from 30 to 99999, got '$BUDGET'"
IFS=, read -r -a SELECTED <<<"$WANTED"
[[ $COMMIT =~ ^([0-9a-f]{4,40})?$ ]] || refuse "--commit must be a hash, 4 to 40 hexadecimal digits, got '$COMMIT'"
[ ${#SELECTED[@]} -gt 0 ] || refuse "--stages must name a stage, got '$WANTED': choose from $(names_of_stages)"
seen=,
for stage in "${SELECTED[@]}"; do
    field "$stage" least >/dev/null || refuse "--stages: unknown stage '$stage': choose from $(names_of_stages)"
    case $seen in *",$stage,"*) refuse "--stages: '$stage' is named twice in '$WANTED'" ;; esac
    seen=$seen$stage,
done
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "$PYTHON" ]; then
    PYTHON=$(command -v "$ROOT/.venv/bin/python" || command -v python || command -v python3) ||
        refuse "there is no python on PATH: name one with --python"
fi
command -v "$PYTHON" >/dev/null || refuse "--python: there is no command '$PYTHON': name an interpreter that has torch"
PYTHON=$(command -v "$PYTHON")
command -v timeout >/dev/null || refuse "there is no timeout on PATH: install coreutils"
mkdir -p "$OUTPUT" 2>/dev/null && [ -w "$OUTPUT" ] ||
    refuse "--output: the folder '$OUTPUT' cannot be made or written to: name another"
OUTPUT=$(cd "$OUTPUT" && pwd)
case $PYTHON in /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
cd "$ROOT" || exit 1

SCRATCH=$(mktemp -d) || exit 1
trap 'rm -rf "$SCRATCH"' EXIT
exec 3>&1
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 NO_COLOR=1 COLUMNS=128
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin

# Running commands. A stage is a function whose output goes to the log; it reports through `outcome` and `notes`.

END=$BUDGET                # of the budget, as SECONDS counts
stage_end=$((END - RESERVE))
child='' current='' outcome='' notes='' timed_out=''

limited() { # SECONDS COMMAND...: runs it for so long at most, and no longer than the stage may
    local seconds=$1 began=$SECONDS code
    shift
    [ $((stage_end - SECONDS)) -ge "$seconds" ] || seconds=$((stage_end - SECONDS))
    timed_out=1
    [ "$seconds" -ge 1 ] || return 124
    printf '$ %s\n' "$*" >&2
    timeout -k "$GRACE" "$seconds" "$@" 3>&- & # a process group of its own, all of which timeout ends
    child=$!
    wait "$child"
    code=$?
    child=''
    case $code in 124 | 137) [ $((SECONDS - began)) -ge "$seconds" ] || timed_out='' ;; *) timed_out='' ;; esac
    return "$code"
}

note() { notes=$notes${notes:+; }$1; }

skip() {
    outcome=skipped
    note "$1"
}

fail() {
    outcome=failed
    note "$1"
}

became() { # CODE WHAT: takes the end of a command over into the stage's outcome
    if [ -n "$timed_out" ]; then
        [ "$outcome" = failed ] || outcome='timed out'
        note "$2 was cut off"
    elif [ "$1" -ne 0 ]; then
        fail "$2: exit code $1"
    fi
}

# Stages.

stage_build() {
    local tool
    for tool in 'nvidia-smi -L' \
        'nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu --format=csv' \
        'nvcc --version'; do
        command -v "${tool%% *}" >/dev/null || continue
        # shellcheck disable=SC2086 # the words of a command
        limited 20 $tool
    done
    if [ -d csrc ]; then
        if limited 60 "$PYTHON" -c 'from googlenet_fused.backends.cuda import native; raise SystemExit(native.load())'; then
            note 'the CUDA library is there already'
        else
            limited "$stage_limit" "$PYTHON" csrc/build.py cuda
            became $? 'csrc/build.py cuda'
        fi
    else
        note 'nothing to build: this checkout has no csrc/'
        limited "$stage_limit" "$PYTHON" -c 'import googlenet_fused'
        became $? 'import googlenet_fused'
    fi
    limited 60 "$PYTHON" -m googlenet_fused doctor
    became $? doctor
}

stage_tests() {
    # Only the files that hold such tests: others import packages that may not be here. Another torch's warnings fail nothing.
    local files=() file code
    for file in tests/test_*.py; do grep -q 'mark\.gpu' "$file" && files+=("$file"); done
    if [ ${#files[@]} -eq 0 ]; then
        skip 'no GPU tests'
        return
    fi
    limited "$stage_limit" "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -W default \
        --junitxml "$OUTPUT/tests.xml" "${files[@]}"
    code=$?
    if [ "$code" -eq 5 ]; then skip 'no GPU tests'; else became "$code" pytest; fi
    [ "$code" -ne 0 ] || verify
}

unsound=''
verify() { # what passed here, for automatic choice to go by once it is committed
    if [ -n "$unsound" ]; then
        note 'not recorded as verified: the sanitizer failed'
        return
    fi
    if limited 60 "$PYTHON" -m benchmarks.verify "$OUTPUT/tests.xml" ${COMMIT:+--commit "$COMMIT"} \
        >"$SCRATCH/verified" 2>"$SCRATCH/verify"; then
        cp "$SCRATCH/verified" "$OUTPUT/verified.json"
        return
    fi
    cat "$SCRATCH/verify"
    if [ -n "$timed_out" ]; then
        note 'not recorded as verified: no time was left'
    else
        note "not recorded as verified: $(tail -n 1 "$SCRATCH/verify" | sed 's/^error: //')"
    fi
}

void_record() { # tests that the sanitizer fails prove nothing
    unsound=1
    [ -f "$OUTPUT/verified.json" ] || return 0
    rm -f "$OUTPUT/verified.json"
    note 'the tests are not recorded as verified'
}

sanitizer_lines=()
has_kernels() {
    grep -rqE --include='*.py' --include='*.cu*' --include='*.h' '@triton\.jit|__global__' googlenet_fused csrc 2>/dev/null
}

sanitize() { # TOOL WHAT OPTION... -- COMMAND...: sets `verdict`; what it means for the stage goes into `outcome`
    local tool=$1 what=$2 options=() code total ours
    shift 2
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    # Torch's caching allocator would hide where one tensor ends and the next begins.
    limited 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --target-processes all \
        --error-exitcode "$FOUND" --check-exit-code no --print-limit 10000 ${options[@]+"${options[@]}"} "$@" \
        >"$SCRATCH/sanitizer" 2>&1
    code=$?
    cat "$SCRATCH/sanitizer"
    total=$(sed -n 's/^=* .*SUMMARY: \([0-9][0-9]*\) .*/\1/p' "$SCRATCH/sanitizer" | tail -n 1)
    ours=$(grep -cE "^=+ +at .*$OUR_KERNELS" "$SCRATCH/sanitizer")
    if grep -qi 'device not supported' "$SCRATCH/sanitizer"; then
        verdict='device not supported'
    elif [ -n "$timed_out" ]; then
        verdict='cut off'
        became "$code" "$tool, $what"
    elif [ "$code" -eq 0 ]; then
        verdict=clean
    elif [ "$what" = tests ] && [ "$code" -eq 5 ]; then
        verdict='no tests'
    elif [ "$what" != tests ] && [ "$code" -eq 2 ] && grep -q '"skipped"' "$SCRATCH/sanitizer"; then
        verdict='not for this device'
    elif [ "$what" = tests ] && [ "$tool" = initcheck ] && [ "$code" -eq "$FOUND" ] && [ "$ours" -eq 0 ]; then
        verdict="clean in our kernels, ${total:-?} reports of others" # libraries read padding they never use
    elif [ "$code" -eq "$FOUND" ]; then
        verdict="${total:-?} FOUND"
        fail "$tool, $what: ${total:-?} found"
    else
        verdict="exit code $code"
        became "$code" "$tool, $what"
    fi
    [ "$what" != tests ] || [ "$outcome" != failed ] || void_record
}

stage_sanitizer() {
    local tool probe line tools='memcheck racecheck synccheck initcheck' done_any=''
    if ! command -v compute-sanitizer >/dev/null; then
        skip 'compute-sanitizer is not on PATH'
        return
    fi
    if ! has_kernels; then
        note 'no GPU kernels of our own yet: memcheck only on the tests'
        tools=memcheck
    fi
    line='sanitizer, tests:'
    for tool in $tools; do
        case $tool in
            # Torch's allocator and cuDNN ask the driver for what it may not have, which is no error of theirs.
            memcheck) set -- --report-api-errors no ;;
            racecheck) set -- --kernel-name "kns=$OUR_KERNELS" ;;
            # No filter for initcheck: what filtered kernels wrote would count as never written.
            *) set -- ;;
        esac
        sanitize "$tool" tests "$@" -- \
            "$PYTHON" -m pytest -q -m 'gpu and sanitizer' -p no:cacheprovider -W default tests/test_gpu.py
        line="$line $tool $verdict;"
        case $verdict in clean* | *FOUND) done_any=1 ;; esac
    done
    sanitizer_lines+=("${line%;}")
    if build_probes; then
        for probe in $PROBES; do
            line="sanitizer, $probe:"
            for tool in memcheck racecheck synccheck initcheck; do
                sanitize "$tool" "$probe" -- "benchmarks/probes/build/$probe" --quick
                line="$line $tool $verdict;"
                case $verdict in clean* | *FOUND) done_any=1 ;; esac
            done
            sanitizer_lines+=("${line%;}")
        done
    fi
    [ -n "$done_any" ] || [ "$outcome" != ok ] || skip 'no check could run'
}

build_probes() {
    if [ ! -d benchmarks/probes ]; then
        note 'this checkout has no benchmarks/probes'
    elif ! command -v nvcc >/dev/null || ! command -v make >/dev/null; then
        note 'nvcc or make is not on PATH, so the CUDA probes cannot be built'
    else
        limited 60 make -j 4 -C benchmarks/probes
        became $? 'make -C benchmarks/probes' # some may be there even so
        return 0
    fi
    return 1
}

probe() { # NAME COMMAND...: keeps the line of JSON that it prints, or one that says why there is none
    local name=$1 code
    shift
    limited 30 "$@" >"$SCRATCH/probe"
    code=$?
    cat "$SCRATCH/probe"
    if ! grep '^{' "$SCRATCH/probe" >>"$OUTPUT/probes.jsonl"; then
        printf '{"probe": "%s", "error": "no result, exit code %s"}\n' "$name" "$code" >>"$OUTPUT/probes.jsonl"
    fi
    if [ "$code" -eq 2 ]; then note "$name cannot run here"; else became "$code" "$name"; fi
}

stage_probes() {
    local name any=''
    if build_probes; then
        any=1
        for name in $PROBES; do
            if [ -n "$no_gpu" ]; then
                break
            elif [ -x "benchmarks/probes/build/$name" ]; then
                probe "$name" "benchmarks/probes/build/$name"
            else
                note "$name was not built"
            fi
        done
    fi
    if [ ! -f benchmarks/probes/e4_triton_tma.py ]; then
        note 'there is no e4_triton_tma.py'
    elif "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("triton") is None)'; then
        any=1
        probe e4_triton_tma "$PYTHON" benchmarks/probes/e4_triton_tma.py
    else
        note 'e4_triton_tma: triton is not installed'
    fi
    if [ -z "$no_gpu" ] && [ -f "$OUTPUT/results.json" ] && [ -f benchmarks/probes/e3_peers.py ]; then
        any=1
        probe e3_peers "$PYTHON" benchmarks/probes/e3_peers.py "$OUTPUT/results.json"
    fi
    if [ -z "$any" ]; then
        skip 'there is nothing to build or run them with'
    elif [ -n "$no_gpu" ]; then
        note "compiled only, $no_gpu"
    fi
}

OURS=''
ours() { # sets OURS, the providers of this package that are for a GPU
    [ -z "$OURS" ] || return 0
    limited 60 "$PYTHON" -c 'from benchmarks.providers import lineup
from benchmarks.reading import is_ours
print(*(provider.name for provider in lineup("cuda") if is_ours(provider.name)))' >"$SCRATCH/ours" &&
        read -r OURS <"$SCRATCH/ours" && [ -n "$OURS" ] && return 0
    fail 'the providers could not be listed'
    return 1
}

# LEAST SHARE LAST WORDS...: benchmarks.run with these arguments for SHARE percent of what is left of the stage, if that is
# LEAST seconds. No case is begun after LAST percent of it, so that it ends by itself; each is in the file once it is done.
measure() {
    local least=$1 span=$(((stage_end - SECONDS) * $2 / 100)) last=$3 what
    shift 3
    what=$(printf '%s' "${*%% --batches*}" | sed 's/--[a-z]* //g')
    if [ "$span" -lt "$least" ]; then
        note "no time for $what"
        return
    fi
    limited "$span" "$PYTHON" -m benchmarks.run --device cuda --output "$OUTPUT/results.json" --append \
        --budget $((span * last / 100)) ${COMMIT:+--commit "$COMMIT"} "$@"
    became $? "$what"
}

# Half precision, which is what such machines are for, comes first: the rest is measured in what time it leaves. The largest
# batch of the modules says little that 128 does not, and takes the longest.
# shellcheck disable=SC2086 # lists of names
stage_bench_nets() {
    ours || return
    measure 15 60 80 --subjects nets --modes inference --dtypes fp16 --batches 1 8 32 128 --providers $QUICK_PEERS $OURS
    measure 15 100 80 --subjects nets --modes inference --dtypes bf16 tf32 --batches 1 8 32 128 --providers $QUICK_PEERS $OURS
}

# shellcheck disable=SC2086
stage_bench_modules() {
    ours || return
    measure 15 60 80 --subjects modules --modes inference --dtypes fp16 --batches 1 8 32 128 --providers $QUICK_PEERS $OURS
    measure 15 80 80 --subjects modules --modes inference --dtypes bf16 tf32 --batches 1 8 32 128 \
        --providers $QUICK_PEERS $OURS
    measure 15 100 80 --subjects modules --modes inference --dtypes fp16 bf16 tf32 --batches 256 --providers $QUICK_PEERS $OURS
}

# A case takes a minute and more to compile. One that is measured again has all its rows replaced, so the second of these
# measures all that the first does; what that compiled is in the compiler's cache.
# shellcheck disable=SC2086
stage_bench_compile() {
    local compiled='compile_default compile_reduce_overhead'
    ours || return
    measure 60 100 50 --subjects torchvision --modes inference --dtypes fp16 --batches 8 1 32 \
        --providers $QUICK_PEERS $compiled $OURS
    [ "$outcome" = ok ] || return
    measure 180 100 30 --subjects torchvision --modes inference --dtypes fp16 --batches 8 1 32 \
        --providers $QUICK_PEERS $compiled compile_max_autotune $OURS
}

# shellcheck disable=SC2086
stage_bench_training() {
    ours || return
    measure 15 100 80 --subjects nets --modes training --dtypes bf16 tf32 --batches 32 --providers eager channels_last $OURS
}

# The machine, asked once.

DETECT='import platform
try:
    import torch
except Exception as error:
    print("torch does not import:", type(error).__name__, (str(error) or "without a reason").splitlines()[0])
    print("Python", platform.python_version())
else:
    print("cuda" if torch.cuda.is_available() else "no CUDA device: torch.cuda.is_available() is False")
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        print(f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors,", end=" ")
        print(f"{gpu.total_memory / 2**30:.0f} GiB", end=", ")
    try:
        from importlib.metadata import version
        triton = version("triton")
    except Exception:
        triton = "none"
    print(f"torch {torch.__version__}, triton {triton}, CUDA {torch.version.cuda}, Python {platform.python_version()}")'

detect() { # sets no_gpu, the reason or nothing, and machine
    local answer
    limited 120 "$PYTHON" -c "$DETECT" >"$SCRATCH/machine" 2>"$SCRATCH/detect"
    answer=$?
    { read -r no_gpu && read -r machine; } <"$SCRATCH/machine"
    if [ $answer -ne 0 ]; then
        no_gpu="torch could not be asked for a CUDA device: the interpreter ended with exit code $answer"
        machine="unknown: $(tail -n 1 "$SCRATCH/detect")"
    elif [ -z "$no_gpu" ]; then
        refuse "--python: '$PYTHON' answered nothing and is no Python: name an interpreter that has torch"
    elif [ "$no_gpu" = cuda ]; then
        no_gpu=''
        command -v nvidia-smi >/dev/null &&
            machine="$machine, driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1 | head -n 1)"
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
        no_gpu="$no_gpu, though nvidia-smi lists a GPU"
    fi
}

# The stages in turn.

OUTCOMES=() TIMES=() NOTES=()
for stage in "${SELECTED[@]}"; do
    OUTCOMES+=('to come') TIMES+=('') NOTES+=('')
done

summary() {
    local i
    printf 'machine: %s\n' "$machine"
    for i in "${!SELECTED[@]}"; do
        printf '%-14s  %-11s  %4s s  %s\n' "${SELECTED[i]}" "${OUTCOMES[i]}" "${TIMES[i]:--}" "${NOTES[i]}" | cut -c 1-150
    done
    printf '%s\n' ${sanitizer_lines[@]+"${sanitizer_lines[@]}"} | grep . | cut -c 1-150
    timeout -k 2 20 "$PYTHON" -m benchmarks.summary "$OUTPUT" 2>"$SCRATCH/summary" ||
        printf 'no summary of the files: %s\n' "$(tail -n 1 "$SCRATCH/summary")"
    printf '%s s of %s; files in %s\n' "$SECONDS" "$BUDGET" "$OUTPUT"
}

write_summary() { # for a reader of the folder while the rest runs, and if the script is killed
    summary >"$SCRATCH/text"
    cp "$SCRATCH/text" "$OUTPUT/summary.txt"
}

close_log() { # the stage's own log, cut, goes at the end of the log
    local size
    [ -f "$OUTPUT/stage.txt" ] || return 0
    size=$(($(wc -c <"$OUTPUT/stage.txt")))
    {
        printf '\n===== %s: %s =====\n' "$current" "$outcome"
        [ "$size" -le $LOG_BYTES ] || printf '[the first %s bytes are left out]\n' $((size - LOG_BYTES))
        tail -c $LOG_BYTES "$OUTPUT/stage.txt"
    } >>"$OUTPUT/log.txt"
    rm -f "$OUTPUT/stage.txt"
}

interrupted() { # EXIT CODE
    local i
    trap '' INT TERM HUP
    exec 1>&3 2>&3
    if [ -n "$child" ]; then
        kill -TERM "$child" 2>/dev/null # timeout passes it on to all of its group and kills what is left
        wait "$child"
    fi
    outcome=interrupted
    close_log
    for i in "${!SELECTED[@]}"; do
        [ "${OUTCOMES[i]}" != 'to come' ] || OUTCOMES[i]='not run'
        [ "${SELECTED[i]}" != "$current" ] || OUTCOMES[i]=interrupted TIMES[i]=$((SECONDS - began))
    done
    write_summary
    cat "$OUTPUT/summary.txt"
    exit "$1"
}

limit_of() { # INDEX: the seconds that stage may take now; it and those before it in SELECTED are not to come
    local left=$((END - RESERVE - SECONDS)) limit weight weights=0 later=0 i least
    limit=$(field "${SELECTED[$1]}" limit)
    weight=$(field "${SELECTED[$1]}" weight)
    least=$(field "${SELECTED[$1]}" least)
    if [ "$weight" -gt 0 ]; then
        for ((i = $1; i < ${#SELECTED[@]}; i++)); do
            weights=$((weights + $(field "${SELECTED[i]}" weight)))
            later=$((later + $(field "${SELECTED[i]}" limit)))
        done
        limit=$(((left - later) * weight / weights))
        [ "$limit" -ge "$least" ] || limit=$least
    fi
    echo $((limit < left ? limit : left))
}

began=0 machine=unknown no_gpu=''
trap 'interrupted 130' INT
trap 'interrupted 143' TERM
trap 'interrupted 129' HUP
detect
for name in summary.txt log.txt stage.txt tests.xml verified.json probes.jsonl; do rm -f "$OUTPUT/$name"; done
printf 'machine: %s\n' "$machine"
[ -z "$no_gpu" ] || printf '%s\n' "$no_gpu"
failures=0
for i in "${!SELECTED[@]}"; do
    current=${SELECTED[i]} outcome=ok notes='' began=$SECONDS
    stage_limit=$(limit_of "$i")
    stage_end=$((SECONDS + stage_limit))
    case $current in build | probes) needs_gpu='' ;; *) needs_gpu=1 ;; esac
    if [ -n "$needs_gpu" ] && [ -n "$no_gpu" ]; then
        skip "$no_gpu"
    elif [ "$stage_limit" -lt "$(field "$current" least)" ]; then
        skip "$((stage_limit > 0 ? stage_limit : 0)) s of the budget were left, it needs $(field "$current" least)"
    else
        printf '==> %s, at most %s s\n' "$current" "$stage_limit"
        "stage_${current//-/_}" >>"$OUTPUT/stage.txt" 2>&1
    fi
    OUTCOMES[i]=$outcome TIMES[i]=$((SECONDS - began)) NOTES[i]=$notes
    printf '    %s: %s, %s s%s\n' "$current" "$outcome" "${TIMES[i]}" "${notes:+ ($notes)}"
    case $outcome in
        failed | 'timed out')
            failures=1
            tail -n 15 "$OUTPUT/stage.txt" | cut -c 1-200 | sed 's/^/    | /'
            ;;
    esac
    close_log
    write_summary
done
current=''
echo
cat "$OUTPUT/summary.txt"
exit $failures
