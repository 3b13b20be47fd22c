#!/usr/bin/env bash
# One command from a fresh clone to reports/index.html. ./run_all.sh --help tells the rest.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
here=$PWD
venv=$root/.venv
fail() { printf 'run_all.sh: %s\n' "$*" >&2; exit 2; }
say() { printf '%s\n' "$*" >&2; }

usage() {
    cat <<'TEXT'
Usage: ./run_all.sh [--profile auto|cpu|gpu] [--domain faces|objects] [--only STEP] [--list]
                    [--reports DIR] [--fresh] [--timeout SECONDS]
                                  run the notebooks of a profile, build reports/index.html;
                                  what has not changed is not computed again, unless --fresh
       ./run_all.sh NOTEBOOK.ipynb [-p NAME VALUE]... [-f PARAMS.yaml] [--name RUN]
                    [--fresh] [--timeout SECONDS]
                                  run one notebook into a report (the same as `run NOTEBOOK`)
       ./run_all.sh validate DATASET [--html PAGE] [--json] [--fix DIR]
                                  gate a dataset; exit 0 passes, 1 fails
       ./run_all.sh views PICTURE [--out DIR]
                                  the object in one picture from all sides: views, a turntable,
                                  a page to turn it in, and its Gaussians
       ./run_all.sh study STUDY.yaml [--list]
                                  run what is not finished of a study
       ./run_all.sh --on ssh://USER@HOST/DIR --budget USD --rate USD [any of the above]
                    [--gpus N] [--at-end stay|poweroff|'COMMAND'] [--grace 30m] [--dry-run]
                                  the same on a machine with a GPU, for at most that money;
                                  also slurm://USER@LOGIN/DIR and sky (docs/gpu-box.md)
       ./run_all.sh remote status|logs [-f]|fetch [--wait]|resume|stop RUN
                                  the runs that are elsewhere
       ./run_all.sh pages         make every report's page and the index again, without a new run
       ./run_all.sh clean [--dry-run] [FOLDER ...]
                                  remove what killed processes left
       ./run_all.sh furniture --apt --out DIR
                                  render a set of 554 objects
       ./run_all.sh heads --out DIR [--count 500] [--assets FOLDER] [--seed 0]
                                  render human heads, as many as wanted
       ./run_all.sh lab           open the notebooks in JupyterLab
       ./run_all.sh test          ruff, mypy, nbstripout, pytest
       ./run_all.sh setup         only make the environment
       ./run_all.sh lock          make requirements.lock again, from a fresh environment
       ./run_all.sh COMMAND --help

It works from any folder: relative paths are those of the caller.

The environment is made on the first call, and again only when requirements.lock or
pyproject.toml has changed: the active conda environment if there is one (make it with
`conda env create -f environment.yml`), else .venv from requirements.lock.

Variables:
  FRESNEL_PYTHON   use this Python as it is and install nothing, e.g. FRESNEL_PYTHON=python3 on a
                   machine whose Python has a working CUDA torch, or that has no network
  FRESNEL_BASE     the Python 3.11+ to make .venv with (default: the first of python3.13 ... python3)
  FRESNEL_INSTALL_BROWSER=1
                   let `test`, run by root, install chromium with apt-get where there is none

Exit status: 0 all well; 1 a notebook crashed, or a verdict was not the expected one, or a test
failed; 2 wrong use, or no environment; 130 stopped. Of one notebook, besides: 3 refused by its
protocol, 4 its Python died, 5 the page is only a plain one, 6 the disk is full, 124 timed out.
TEXT
}

modern() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${FRESNEL_BASE:-python3 python3.11 python3.12 python3.13 python}; do
        if command -v "$candidate" >/dev/null && modern "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or newer; found none${FRESNEL_BASE:+ in FRESNEL_BASE=$FRESNEL_BASE}"
}

make_venv() {  # make_venv FOLDER
    local python
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make environments (no venv or ensurepip); on Debian or Ubuntu:" \
            "apt-get install python3-venv"
    "$python" -m venv --clear "$1" || fail "could not make the environment $1"
}

install_into() {  # install_into PYTHON STAMP
    local python=$1 stamp=$2 wanted
    wanted=$("$python" - "$root" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{sys.version_info[:2]} {root}".encode())
for name in ("requirements.lock", "pyproject.toml"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PY
    )
    [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && return
    say "Setting up the environment (once; several minutes, about 2 GB with a CPU torch)."
    local quiet=(--quiet)
    if [[ -t 2 ]]; then quiet=(); fi  # a person watching sees pip's progress
    local pip=("$python" -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check)
    # the lock is complete, so nothing is looked for that it does not name; then torch, see there
    { "${pip[@]}" --no-deps --require-hashes -r "$root/requirements.lock" &&
        "${pip[@]}" "$(grep -oE '\btorch==[0-9.]+' "$root/requirements.lock")"; } ||
        fail "could not install requirements.lock; see above. No network? Set FRESNEL_PYTHON."
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
        -e "$root" || fail "could not install the project itself; see above"
    # the CPU renderer is compiled here (10 s), where nobody waits for a page yet; else at first use
    "$python" -c 'import torch
from fresnel import Cameras, Gaussians
from fresnel.render import render
one = torch.ones(1, 4)
thing = Gaussians(one[:, :3], one, one[:, :3], one[:, 0], one[:, :3])
render(thing, Cameras(torch.eye(4)[None], torch.eye(3)[None], 16, 16))' || true
    printf '%s\n' "$wanted" >"$stamp"
}

choose_python() {  # sets $python, and sets the environment up where that is ours to do
    if [[ -n ${FRESNEL_PYTHON:-} ]]; then
        python=$(command -v -- "$FRESNEL_PYTHON") || fail "FRESNEL_PYTHON=$FRESNEL_PYTHON: not found"
        modern "$python" || fail "FRESNEL_PYTHON=$FRESNEL_PYTHON: is older than Python 3.11"
        return
    fi
    if [[ -n ${CONDA_PREFIX:-} && -x $CONDA_PREFIX/bin/python ]] &&
        modern "$CONDA_PREFIX/bin/python"; then
        if [[ ${CONDA_DEFAULT_ENV:-} != base ]]; then
            python=$CONDA_PREFIX/bin/python
            install_into "$python" "$CONDA_PREFIX/.fresnel-stamp"
            return
        fi
        say "conda's base environment is left alone; using .venv."
    fi
    python=$venv/bin/python
    # two first calls at once must not set up the same folder together
    exec 9>"$root/.venv.lock"
    if command -v flock >/dev/null; then flock 9; fi
    if ! { [[ -x $python ]] && modern "$python" && "$python" -m pip --version >/dev/null 2>&1; }; then
        make_venv "$venv"
    fi
    install_into "$python" "$venv/.fresnel-stamp"
    exec 9>&-
}

run_fresnel() {  # in the project, where a notebook's relative paths begin
    cd "$root"
    export FRESNEL_CALLER=$here
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    # torch's idle OpenMP threads otherwise spin on the cores that the renderer needs
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
    exec "$python" -m fresnel "$@"
}

find_browser() {  # Chromium for tests/test_browser.py; CI, whose machine is its own, installs it
    local name
    for name in chromium chromium-browser google-chrome; do
        if command -v "$name" >/dev/null; then return; fi
    done
    if [[ -n ${FRESNEL_INSTALL_BROWSER:-} && $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        say "Installing chromium for the browser tests."
        if apt-get update -qq >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
            --no-install-recommends chromium >/dev/null; then return; fi
    fi
    say "No Chromium: the browser tests are skipped."
}

run_tests() {
    local status=0
    find_browser
    cd "$root"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} NUMBA_NUM_THREADS=${NUMBA_NUM_THREADS:-1}
    step() { say "== $*"; "$@" || { status=1; say "run_all.sh: failed: $*"; }; }
    local code=(fresnel tests notebooks)
    if [[ -d benchmarks ]]; then code+=(benchmarks); fi
    step "$python" -m ruff check "${code[@]}"
    step "$python" -m ruff format --check "${code[@]}"
    step "$python" -m mypy fresnel
    shopt -s nullglob
    local notebooks=(notebooks/*.ipynb)
    if ((${#notebooks[@]})); then
        step "$python" -m nbstripout --keep-id --verify "${notebooks[@]}"
    fi
    # what shares a browser, notebooks' runs or other processes is tried by one of three
    step "$python" -m pytest -n 3 --dist loadgroup "$@"
    exit "$status"
}

make_lock() {
    local folder torch=torch==${FRESNEL_TORCH:-2.13.0}
    folder=$(mktemp -d)
    trap "rm -rf '$folder'" EXIT
    make_venv "$folder/venv"
    "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv ||
        fail "could not install uv, which resolves the requirements; see above"
    cp "$root/requirements.lock" "$folder/lock"  # versions stay where they still fit
    printf '%s\n' "$torch" >"$folder/torch"
    "$folder/venv/bin/uv" pip compile --quiet --universal --python-version 3.11.2 --generate-hashes \
        --no-annotate --no-header --extra dev --extra lab --extra perceptual \
        --extra viewer \
        --constraint "$folder/torch" "$root/pyproject.toml" --output-file "$folder/lock" >/dev/null ||
        fail "could not resolve the requirements; see above"
    {
        cat <<TEXT
# Everything that pyproject.toml and its extras dev, lab, perceptual and viewer need, on any system
# and from Python 3.11.2 on, with the hashes of every file that PyPI has of it. Made by ./run_all.sh lock,
# which keeps the versions that still fit (empty this file for the newest ones).
#
# $torch is installed beside it and not hashed: its build is another file on every kind of
# machine (CPU, each CUDA), and what only CUDA builds need (nvidia-*, triton) comes with it.
# gsplat compiles its kernels from the files hashed here when a GPU first uses them.
TEXT
        awk '/^[a-z0-9]/ { kept = !/^(torch|triton|cuda-[a-z-]+|nvidia-[a-z0-9-]+)==/ || /^nvidia-ml-py/ }
            kept' "$folder/lock"
    } >"$folder/requirements.lock"
    mv "$folder/requirements.lock" "$root/requirements.lock"
    say "Wrote requirements.lock."
}

case ${1:-} in
    -h | --help | help) usage ;;
    lock) make_lock ;;
    setup) choose_python; say "Python: $python" ;;
    test) shift; choose_python; run_tests "$@" ;;
    lab) shift; choose_python; cd "$root"; exec "$python" -m jupyter lab --notebook-dir "$root/notebooks" "$@" ;;
    --on | --on=*) choose_python; run_fresnel launch "$@" ;;
    "" | -* | *.ipynb) choose_python; run_fresnel run "$@" ;;
    *) choose_python; run_fresnel "$@" ;;
esac
