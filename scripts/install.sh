# Sourced: `make_venv DIRECTORY`, then `install DIRECTORY ARGUMENTS...`, which is `pip install` there. uv does in seconds
# what takes pip minutes, and whatever installs shares its store; where it cannot be had, or fails, pip does the work.
unset PYTHONDONTWRITEBYTECODE  # nothing is compiled ahead: what the first import compiles is for those after it
UV=(env "UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}" "UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-}}")

make_venv() {
  "${PYTHON:-python3}" -m venv "$1"
  "$1/bin/pip" install -q uv==0.13.9 || true
}

install() {
  local venv="$1"
  shift
  if [ -x "$venv/bin/uv" ]; then
    "${UV[@]}" "$venv/bin/uv" pip install -q --python "$venv/bin/python" "$@" && return
    echo "uv failed, so pip installs:" "$@" >&2
  fi
  "$venv/bin/pip" install -q --no-compile "$@"
}
