#!/bin/sh
# The supervisor of one run on the machine with the GPU. POSIX sh; needs flock, setsid, sha256sum,
# timeout, find.
#
#   sh box.sh VERB DIR [RUN]       DIR/tree is the project, DIR/lock is held while a run has the box
#   probe | arm | supervise | foreground | verify | status | stop | log
#
# A run's state is in plain files of DIR/runs/RUN: settings (NAME='value' lines from the laptop),
# command (what to run), stages (lines of NAME COMMAND) and stages.done/NAME; state and why; armed,
# deadline, beat, ended (seconds since 1970), boot (the kernel's boot id), exit, log, results.sha256.
# The laptop says go (all is uploaded), stop and fetched (verified there) by files of that name.
set -u
verb=$1 dir=$2 run=${3:-}
mkdir -p "$dir" && cd "$dir" || exit 2
dir=$(pwd -P) home=$dir/runs/$run
now() { date +%s; }
say() { printf '%s %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*" >>"$home/log"; }
put() { printf '%s\n' "$2" >"$home/.$1" && mv "$home/.$1" "$home/$1"; }  # never half a file
get() { cat "$home/$1" 2>/dev/null; }
boot_id() { cat "${FRESNEL_BOOT_ID:-/proc/sys/kernel/random/boot_id}" 2>/dev/null; }
become() { put why "${2:-}"; put state "$1"; say "$1${2:+: $2}"; }
find_python() {
    for python in ${FRESNEL_BASE:-} "${1:-python3}" python3.13 python3.12 python3.11; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$python" && return
    done
    return 1
}

probe() {  # what a laptop wants to know before it sends anything; `run` is the Python it asked for
    for tool in rsync flock setsid sha256sum timeout find; do
        command -v $tool >/dev/null || echo "missing=$tool"
    done
    echo "python=$(find_python ${run:+"$run"})"
    echo "free_kb=$(df -Pk . | awk 'NR == 2 {print $4}')"
    [ -d tree/.venv ] && echo environment=yes
    echo "gpu=$(nvidia-smi -L 2>/dev/null | head -1 || :)$([ -e /dev/kfd ] && echo AMD || :)"
    if command -v flock >/dev/null && holder; then echo "busy=$(cat holder)"; fi
}
holder() {  # whether a run has the box: it holds the lock, or it waits in Slurm's queue
    ! flock -n lock true || [ "$(cat "runs/$(cat holder 2>/dev/null)/state" 2>/dev/null)" = queued ]
}

arm() {  # start the supervisor, detached, before anything is uploaded
    begin || return 0
    # the lock's descriptor goes on to the supervisor, so that nobody comes in between
    setsid sh "$home/box.sh" supervise "$dir" "$run" </dev/null >/dev/null 2>>"$home/log" &
    echo "deadline=$(get deadline)"
}
begin() {  # take the lock; 75: another run has it, 76: this run's time is over
    exec 9>>lock
    if ! flock -n 9; then
        [ "$(cat holder)" = "$run" ] && { echo "deadline=$(get deadline)"; return 1; }
        echo "busy=$(cat holder)"
        exit 75
    fi
    echo "$run" >holder
    . "$home/settings"
    [ -f "$home/armed" ] || put armed "$(now)"
    [ -f "$home/deadline" ] || put deadline $(($(get armed) + limit_s))
    [ "$(now)" -lt "$(get deadline)" ] || { echo "late=$(get deadline)"; exit 76; }
    rm -f "$home/stop" "$home/ended" "$home/fetched"
    dd if=/dev/zero of="$home/ballast" bs=64k count=16 2>/dev/null  # room to say that the disk is full
    put boot "$(boot_id)"
    become armed "waiting for the upload"
    put beat "$(now)"
}

supervise() {  # the dead man's switch: it ends by itself, whatever becomes of the laptop
    . "$home/settings"
    ended_by=''
    trap 'ended_by=${ended_by:-signal}' TERM INT
    reserve=0
    [ "$at_end" = stay ] || reserve=$grace_s
    last=$(($(get deadline) - reserve))  # nothing of the job lives after that
    while :; do
        ended_by='' moved=$(now)
        touch "$home/mark"
        while [ ! -f "$home/go" ] && watch "$last" "$dir/tree"; do sleep "$tick_s"; done
        if [ -n "$ended_by" ]; then
            finish failed "the upload did not finish: $(reason)"
        else
            rm -f "$home/go"
            attempt
        fi
        [ "$at_end" != stay ] && [ "$ended_by" != signal ] || break
        wait_for_fetch || break
    done
    put ended "$(now)"
    if [ "$at_end" != stay ] && [ "$ended_by" != signal ]; then
        say "at the end: $at_end"
        [ "$at_end" = poweroff ] && at_end='sudo -n poweroff || poweroff || sudo -n shutdown -h now'
        sh -c "$at_end" >>"$home/log" 2>&1 9>&- || say "the command at the end failed ($?)"
    fi
}
foreground() {  # in a batch system's job, where everything is there already
    begin || exit 75
    : >"$home/go"
    supervise
    [ "$(get state)" = finished ]
}
attempt() {  # set-up, job, results
    mkdir -p "$home/stages.done" "$home/out"
    while read -r name command <&3; do
        [ -f "$home/stages.done/$name" ] && continue
        become "setting up" "$name"
        guarded sh -c "cd '$dir/tree' && $command"
        if [ "$code" != 0 ]; then
            put exit "$code"
            finish failed "set-up failed in the stage '$name': $(reason)"
            return
        fi
        now >"$home/stages.done/$name"
    done 3<"$home/stages"
    become running
    guarded sh "$home/command"
    put exit "$code"
    case $ended_by in
        stop) finish stopped "$(reason)" ;;
        signal) finish interrupted "$(reason)" ;;
        '') if [ "$code" = 0 ]; then finish finished; else finish failed "$(reason)"; fi ;;
        *) finish failed "$(reason)" ;;
    esac
}
reason() {
    case $ended_by in
        deadline) echo "the budget is spent (the job's time ended $(date -u -d "@$last" +%H:%M:%SZ 2>/dev/null || echo "$last"))" ;;
        stall) echo "no progress for $stall_s s" ;;
        stop) echo "stopped on request" ;;
        signal) echo "the machine's system stopped it" ;;
        *) echo "exit status $code; see its log" ;;
    esac
}
guarded() {  # run a command in a session of its own under watch; sets code, and ended_by if cut short
    ended_by='' moved=$(now)
    touch "$home/mark"
    rm -f "$home/code"
    # TERM reaches the whole group: this shell outlives it, to tell how the command ended
    FRESNEL_RUN=$run FRESNEL_DIR=$dir FRESNEL_HOME=$home FRESNEL_CODE=$home/code setsid sh -c \
        'trap : TERM INT; "$@"; code=$?; echo $code >"$FRESNEL_CODE.new" && mv "$FRESNEL_CODE.new" "$FRESNEL_CODE"' \
        sh "$@" </dev/null >>"$home/log" 2>&1 9>&- 3<&- &
    child=$!
    while [ ! -f "$home/code" ] && kill -0 $child 2>/dev/null && watch $((last - kill_s)) "$home/log" "$home/out" "$dir/tree/runs"; do
        sleep "$tick_s"
    done
    if [ -n "$ended_by" ]; then  # TERM, so that a checkpoint is written; then KILL
        say "TERM: $(reason)"
        end=$(($(now) + kill_s))
        kill -TERM -$child 2>/dev/null
        while [ ! -f "$home/code" ] && [ "$(now)" -lt $end ]; do beat; sleep "$tick_s"; done
    fi
    code=$(get code || echo 137)
    kill -KILL -$child 2>/dev/null
    # a notebook's kernel has a session of its own; it is known by its environment
    for other in $(grep -lzxFs "FRESNEL_HOME=$home" /proc/[0-9]*/environ | cut -d/ -f3); do
        kill -KILL "$other" 2>/dev/null
    done
    wait $child 2>/dev/null
}
beat() { put beat "$(now)"; }
watch() {  # watch UNTIL PLACE...: false, with ended_by, once it is time to end
    end=$1; shift
    beat
    if [ -n "$(find -L "$@" -type f ! -name .ballast -newer "$home/mark" 2>/dev/null | head -1)" ]; then
        touch "$home/mark"
        moved=$(now)
    fi
    [ -n "$ended_by" ] && return 1
    if [ -f "$home/stop" ]; then ended_by=stop
    elif [ "$(now)" -ge "$end" ]; then ended_by=deadline
    elif [ $(($(now) - moved)) -gt "$stall_s" ]; then ended_by=stall
    else return 0; fi
    return 1
}
finish() {  # finish STATE [WHY]: list the results with their sums, then say that it is over
    rm -f "$home/ballast"
    mkdir -p "$home/out"
    [ -e "$home/out/train" ] || ln -s ../../../tree/runs/train "$home/out/train"
    (
        cd "$home" && find -L out -type f ! -name .ballast ! -name '*.lock' -newer armed >.list
        (cd "$dir/tree" && find runs -path '*/receipts/*.json' -newer "$home/armed" 2>/dev/null) |
            while read -r file; do
                mkdir -p "receipts/$(dirname "$file")" && cp "$dir/tree/$file" "receipts/$file"
            done
        [ -d receipts ] && find receipts -type f >>.list
        put why "${2:-}"
        cp log log.txt
        for file in log.txt exit why settings command armed; do [ -f $file ] && echo $file; done >>.list
        tr '\n' '\0' <.list | xargs -0 sha256sum >.sums && mv .sums results.sha256
    ) || say "the list of results could not be written"
    put ended "$(now)"
    become "$1" "${2:-}"
}
wait_for_fetch() {  # true: another try was asked for
    end=$(($(now) + grace_s))
    [ "$(get deadline)" -lt $end ] && end=$(get deadline)
    while [ ! -f "$home/fetched" ] && [ "$(now)" -lt "$end" ]; do
        beat
        [ -f "$home/go" ] && return 0
        sleep "$tick_s"
    done
    return 1
}

status() {
    for name in state why armed deadline beat ended exit boot; do echo "$name=$(get $name | head -1)"; done
    echo "now=$(now)"
    state=$(get state)
    case $state in queued | finished | failed | stopped | interrupted) alive=unknown ;; *)
        alive=yes
        if [ "$(get boot)" != "$(boot_id)" ] || flock -n lock true || [ "$(cat holder)" != "$run" ]; then alive=no; fi ;;
    esac
    echo "alive=$alive"
}
environment() {  # a set-up stage: the Python environment, for the GPU that is there
    . "$home/settings"
    cd tree || return
    if [ -n "$python" ]; then
        FRESNEL_PYTHON=$python ./run_all.sh setup && "$python" -c 'import torch; print("torch", torch.__version__)'
        return
    fi
    rocm=$(cat "${ROCM_PATH:-/opt/rocm}/.info/version" 2>/dev/null | cut -d- -f1)
    if [ -n "$rocm" ]; then  # torch's own index for this ROCm: its build sorts above the plain one
        echo "ROCm $rocm"
        export PIP_EXTRA_INDEX_URL="https://download.pytorch.org/whl/rocm${rocm%.*}"
    fi
    ./run_all.sh setup || return
    if [ -n "$rocm" ]; then
        .venv/bin/python -c 'import torch; assert torch.version.hip, torch.__version__' || return
        .venv/bin/python -m pip install --no-deps "amd_gsplat" --index-url "https://pypi.amd.com/rocm-$rocm/simple/" ||
            echo "No amd_gsplat wheel for ROCm $rocm: rendering stays on the CPU."
    fi
}
accelerator() {  # a set-up stage: a GPU that the system shows must be one that torch can use
    . "$home/settings"
    [ -e /dev/kfd ] || ls /dev/nvidia[0-9]* >/dev/null 2>&1 || { echo "no GPU here"; return 0; }
    "${python:-tree/.venv/bin/python}" -c 'import torch; print(torch.cuda.get_device_name())'
}
verify() {  # names of the uploaded files that are not what was sent; 3: some are not
    cd tree || return 3
    sha256sum -c --quiet "$home/sent.sha256" 2>/dev/null | sed -n 's/: FAILED.*//p' >"$home/bad"
    cat "$home/bad"
    [ ! -s "$home/bad" ] || return 3
}

case $verb in
    probe | arm | supervise | foreground | verify | status | environment | accelerator) "$verb" ;;
    settle) [ -s "$home/results.sha256" ] || finish interrupted "its supervisor is gone: the machine was restarted, or its system ended it" ;;
    go | fetched) : >"$home/$verb" ;;
    stop)
        : >"$home/stop"
        if [ -f "$home/job" ]; then scancel --state=PENDING "$(get job)"; fi
        if [ "$(get state)" = queued ]; then put armed "$(now)"; finish stopped "stopped in the queue"; fi ;;
    submit)
        if holder; then echo "busy=$(cat holder)"; exit 75; fi
        cd "$home" || exit 2
        echo "$run" >"$dir/holder"
        put state queued && sbatch --parsable slurm.sh >job || { put state failed; exit 1; } ;;
    log) if [ "${4:-}" = -f ]; then exec tail -n +1 -F "$home/log"; else exec cat "$home/log"; fi ;;
    *) echo "box.sh: no verb $verb" >&2; exit 2 ;;
esac
