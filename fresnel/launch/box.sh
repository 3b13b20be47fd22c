#!/bin/sh
# sh box.sh VERB DIR RUN ...: the supervisor of a run on the machine with the GPU, in POSIX sh with
# flock, setsid, timeout and sha256sum. DIR/tree is the project, DIR/lock is held while a run has it.
#
# A run's state is in plain files of DIR/runs/RUN: settings (NAME='value' lines of the laptop's),
# command (what to run), stages.done/NAME, state and why, armed and beat (seconds since 1970: the
# clock's start, the last sign of life), boot (the kernel's boot id), job (Slurm's number), exit, log,
# results.sha256. The laptop says go (all is uploaded), stop and fetched (verified there) by files.
set -u
verb=$1 dir=$2 run=$3
mkdir -p "$dir/tree" && cd "$dir" || exit 2
dir=$(pwd -P) home=$dir/runs/$run
now() { date +%s; }
say() { printf '%s %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*" >>"$home/log"; }
put() { printf '%s\n' "$2" >"$home/.$1" && mv "$home/.$1" "$home/$1"; }  # never half a file
get() { cat "$home/$1" 2>/dev/null; }
beat() { put beat "$(now)"; }
tick() { beat; sleep "$tick_s"; }
become() { put why "${2:-}"; put state "$1"; say "$1${2:+: $2}"; }
boot_id() { cat "${FRESNEL_BOOT_ID:-/proc/sys/kernel/random/boot_id}" 2>/dev/null; }

probe() {  # probe ... PYTHON MB: what speaks against a run here, a line each
    for tool in rsync flock setsid timeout sha256sum; do
        command -v $tool >/dev/null || echo "no: lacks $tool; install it there"
    done
    for python in ${4:-python3 python3.11 python3.12 python3.13} none; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break
    done
    [ "$python" != none ] || echo "no: has no Python 3.11 or newer; install one, or name --python"
    free=$(df -Pm . | awk 'NR == 2 {print $4}') wanted=$5
    [ -n "$4" ] || [ -d tree/.venv ] || wanted=$(($5 + 6000))
    [ "$free" -ge $wanted ] || echo "no: has $free MB free in $dir, $wanted MB are needed"
    busy
}
busy() (  # whether a run has the box
    run=$(cat holder 2>/dev/null) && home=$dir/runs/$run && alive &&
        echo "no: is in use by the run $run; wait, stop it, or choose another folder"
)
alive() {  # whether the run goes on, or waits; squeue knows of Slurm's, whose nodes are elsewhere
    if job=$(get job); then
        said=$(squeue -h -j "$job" 2>&1)
        [ -n "$said" ] && [ "${said#*Invalid job id}" = "$said" ]
    else
        [ "$(get boot)" = "$(boot_id)" ] && ! flock -n lock true && [ "$(cat holder)" = "$run" ]
    fi
}
status() {
    . "$home/settings"
    state=$(get state) why=$(get why) now=$(now)
    armed=$(get armed || echo "$now") beat=$(get beat || echo "$now")
    case $state in '' | finished | failed | stopped) ;; *)
        if ! alive; then
            [ "$state" = interrupted ] || why="its machine was restarted, or its system ended it"
            state=interrupted
        elif [ "$state" = interrupted ] && [ -f "$home/job" ]; then
            state=queued  # by Slurm, which starts it again
        fi ;;
    esac
    echo "state=$state" && echo "why=$why" && echo "exit=$(get exit)"
    echo "spent_s=$((beat - armed))" && echo "beat_age_s=$((now - beat))" && echo "left_s=$((armed + limit_s - now))"
}

arm() {  # start the supervisor, detached, before anything is uploaded
    begin || return 0  # it is there
    # the lock's descriptor goes on to the supervisor, so that nobody comes in between
    setsid sh "$home/box.sh" supervise "$dir" "$run" </dev/null >/dev/null 2>>"$home/log" &
}
begin() {  # take the lock; false if this run has it
    exec 9>>lock
    if ! flock -n 9; then
        [ "$(cat holder)" != "$run" ] || return 1
        busy
        exit 75
    fi
    echo "$run" >holder
    . "$home/settings"
    if [ ! -f "$home/armed" ]; then
        : >"$home/since" && put armed "$(now)"
    elif [ -f "$home/job" ]; then  # nothing is paid in Slurm's queue
        put armed $(($(get armed) + $(now) - $(get beat)))
    fi
    [ "$(now)" -lt $(($(get armed) + job_s)) ] || { echo "$run: its deadline is over; a new run needs a new budget"; exit 76; }
    sweep
    rm -f "$home/stop" "$home/fetched" "$home/results.sha256"
    dd if=/dev/zero of="$home/ballast" bs=64k count=16 2>/dev/null  # room to say that the disk is full
    put boot "$(boot_id)"
    beat
    become armed "waiting for the upload"
}
sweep() {  # end what the job left; a notebook's kernel has a session of its own, but its environment
    for other in $(grep -lzxFs "FRESNEL_HOME=$home" /proc/[0-9]*/environ | cut -d/ -f3); do
        kill -KILL "$other" 2>/dev/null
    done
}

foreground() {  # in a batch system's job, where everything is there already
    begin || exit 75
    : >"$home/go"
    supervise
    [ "$(get state)" = finished ]
}
supervise() {  # the dead man's switch: it ends by itself, whatever becomes of the laptop
    . "$home/settings"
    ended_by=''
    trap 'ended_by=${ended_by:-signal}' TERM INT
    last=$(($(get armed) + job_s))  # nothing of the job lives after that
    while :; do
        ended_by='' moved=$(now)
        touch "$home/mark"
        while [ ! -f "$home/go" ] && watch $last "$dir/tree"; do tick; done
        if [ -n "$ended_by" ]; then conclude "the upload did not finish: "; else attempt; fi
        if [ "$at_end" = stay ] || [ "$ended_by" = signal ]; then return; fi
        end=$(($(now) + limit_s - job_s))
        while [ ! -f "$home/fetched" ] && [ ! -f "$home/go" ] && [ "$(now)" -lt $end ]; do tick; done
        [ -f "$home/go" ] || break
    done
    say "at the end: $at_end"
    [ "$at_end" = poweroff ] && at_end='sudo -n poweroff || poweroff || sudo -n shutdown -h now'
    sh -c "$at_end" >>"$home/log" 2>&1 9>&- || say "the command at the end failed ($?)"
}
attempt() {  # set-up, job, results
    rm -f "$home/go"
    mkdir -p "$home/stages.done" "$home/out"
    for name in $stages; do
        [ -f "$home/stages.done/$name" ] && continue
        become "setting up" "$name"
        guarded sh "$home/box.sh" "$name" "$dir" "$run"
        [ "$code" = 0 ] || { conclude "set-up failed in the stage '$name': "; return; }
        now >"$home/stages.done/$name"
    done
    become running
    guarded sh "$home/command"
    conclude
}
guarded() {  # run a command under watch; sets code, and ended_by if it is cut short
    ended_by='' moved=$(now)
    touch "$home/mark"
    # timeout turns a TERM into one to the command, then KILL; alone, should this shell be killed
    FRESNEL_RUN=$run FRESNEL_DIR=$dir FRESNEL_HOME=$home timeout --foreground -k "$kill_s" \
        $((last - $(now) + 1)) "$@" </dev/null >>"$home/log" 2>&1 9>&- &
    child=$!
    while kill -0 $child 2>/dev/null && watch $((last - kill_s)) "$home/log" "$home/out" "$dir/tree/runs"; do tick; done
    [ -z "$ended_by" ] || say "TERM: $ended_by"  # so that a checkpoint is written
    [ -z "$ended_by" ] || kill -TERM $child 2>/dev/null
    while kill -0 $child 2>/dev/null; do tick; done
    wait $child
    code=$?
    put exit $code
    sweep
}
watch() {  # watch UNTIL PLACE...: false, with ended_by, once it is time to end
    end=$1; shift
    # a large tree is looked through only where half of the time without progress has gone by
    if [ $(($(now) - moved)) -gt $((stall_s / 2)) ] &&
        find -L "$@" -type f ! -name .ballast -newer "$home/mark" 2>/dev/null | grep -q .; then
        touch "$home/mark"
        moved=$(now)
    fi
    if [ -n "$ended_by" ]; then return 1
    elif [ -f "$home/stop" ]; then ended_by=stop
    elif [ "$(now)" -ge "$end" ]; then ended_by=deadline
    elif [ $(($(now) - moved)) -gt "$stall_s" ]; then ended_by=stall; fi
    [ -z "$ended_by" ]
}
conclude() {  # conclude [WHERE]: what becomes of the run, by how its last command ended
    case ${ended_by:-$code} in
        0) finish finished ;;
        stop) finish stopped "${1:-}stopped on request" ;;
        signal) finish interrupted "${1:-}the machine's system stopped it" ;;
        stall) finish failed "${1:-}no progress for $stall_s s" ;;
        deadline) finish failed "${1:-}the budget is spent: the job's time ended at $(date -u -d "@$last" +%H:%M:%SZ)" ;;
        *) finish failed "${1:-}exit status $code; see its log" ;;
    esac
}
finish() {  # finish STATE [WHY]: list the results with their sums, then say that it is over
    rm -f "$home/ballast"
    put why "${2:-}"
    mkdir -p "$home/out"
    ln -sfn ../../tree/runs "$home/runs"
    (
        cd "$home" && cp log log.txt
        {
            find -L out runs -type f -newer since ! -name .ballast ! -name '*.lock' \
                \( -path 'out/*' -o -path 'runs/train/*' -o -path '*/receipts/*.json' \)
            ls log.txt exit why settings command diff.patch armed 2>/dev/null
        } | tr '\n' '\0' | xargs -0 sha256sum >.sums && mv .sums results.sha256
    ) || say "the list of results could not be written"
    beat
    become "$1" "${2:-}"
}

environment() {  # a set-up stage: the Python environment, for the GPU that is there
    . "$home/settings"
    cd tree || return
    [ -z "$python" ] || { "$python" -c 'import torch; print("torch", torch.__version__)'; return; }
    rocm=$(cat "${ROCM_PATH:-/opt/rocm}/.info/version" 2>/dev/null | cut -d- -f1)
    [ -n "$rocm" ] || { ./run_all.sh setup; return; }
    # torch's own index for this ROCm: its build sorts above the plain one
    PIP_EXTRA_INDEX_URL="https://download.pytorch.org/whl/rocm${rocm%.*}" ./run_all.sh setup || return
    .venv/bin/python -c 'import torch; assert torch.version.hip, torch.__version__' || return
    .venv/bin/python -m pip install --no-deps amd_gsplat --index-url "https://pypi.amd.com/rocm-$rocm/simple/" ||
        echo "No amd_gsplat wheel for ROCm $rocm: rendering stays on the CPU."
}
accelerator() {  # a set-up stage: a GPU that the system shows must be one that torch can use
    . "$home/settings"
    [ -e /dev/kfd ] || ls /dev/nvidia[0-9]* >/dev/null 2>&1 || { echo "no GPU here"; return 0; }
    "${python:-tree/.venv/bin/python}" -c 'import torch; print(torch.cuda.get_device_name())'
}
verify() {  # names of the uploaded files that are not what was sent; 1: there are some
    cd tree && [ -r "$home/sent.sha256" ] || return 2
    ! LC_ALL=C sha256sum -c --quiet "$home/sent.sha256" 2>/dev/null | sed -n 's/: FAILED.*//p' | grep .
}

case $verb in
    probe | status | arm | foreground | supervise | environment | accelerator | verify) "$verb" "$@" ;;
    settle) [ -s "$home/results.sha256" ] || finish interrupted "its supervisor is gone: the machine was restarted, or its system ended it" ;;
    go | fetched) : >"$home/$verb" ;;
    stop)
        : >"$home/stop"
        if job=$(get job); then scancel --state=PENDING "$job"; fi
        if [ "$(get state)" = queued ]; then finish stopped "stopped in the queue"; fi ;;
    submit)
        if busy; then exit 75; fi  # not by the lock alone, while it waits
        echo "$run" >holder
        become queued
        cd "$home" && sbatch --parsable slurm.sh >.job && mv .job job ;;
    log) if [ "${4:-}" = -f ]; then exec tail -n +1 -F "$home/log"; else exec cat "$home/log"; fi ;;
    *) echo "box.sh: no verb $verb" >&2; exit 2 ;;
esac
