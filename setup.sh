#!/bin/sh
# Sets a machine up for geoaug: virtual environment, the project with its tools, and FFCV where it can be built.
# Safe to run again. Called by the Makefile; VENV and PYTHON choose the environment and the interpreter.
set -eu
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
FFCV_PACKAGES="libturbojpeg0-dev libopencv-dev pkg-config g++"

say() { printf 'setup: %s\n' "$*"; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null 2>&1; then sudo -n "$@"; else return 1; fi
}

apt_install() {
    command -v apt-get >/dev/null 2>&1 || return 1
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq update >/dev/null 2>&1 || true
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends -y "$@" >/dev/null 2>&1
}

ffcv_libraries() {
    command -v pkg-config >/dev/null 2>&1 && command -v g++ >/dev/null 2>&1 &&
        pkg-config --exists opencv4 libturbojpeg
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    say "Python 3.11 or newer is needed, $PYTHON is $("$PYTHON" --version 2>&1); set PYTHON=python3.x"
    exit 1
}

if [ ! -x "$VENV/bin/python" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    "$PYTHON" -m venv "$VENV" >/dev/null 2>&1 || { apt_install python3-venv && "$PYTHON" -m venv "$VENV"; } || {
        say "no virtual environment could be made: apt-get install python3-venv"
        exit 1
    }
fi

say "installing geoaug and its tools into $VENV (PyTorch is large: minutes on a slow line)"
"$VENV/bin/python" -m pip install -q --disable-pip-version-check -e ".[dev]"

if ! "$VENV/bin/python" -c 'import ffcv' >/dev/null 2>&1; then
    ffcv_libraries || apt_install $FFCV_PACKAGES || true
    if ffcv_libraries && "$VENV/bin/python" -m pip install -q --disable-pip-version-check -e ".[ffcv]"; then
        say "FFCV built"
    else
        say "going on without FFCV. For it: sudo apt-get install --no-install-recommends $FFCV_PACKAGES" \
            "(conda: conda install -c conda-forge libjpeg-turbo opencv pkg-config cxx-compiler), then: rm $VENV/.ready && make setup"
    fi
fi
say "ready"
