"""What `libortho demo` prints in a terminal of 80 columns, stored for the picture of the quick start.

    python benchmarks/terminal.py DIRECTORY     the models of the demonstration lie in DIRECTORY/demo afterwards

Run `python -m benchmarks.report` next: it draws docs/images/terminal.svg. Progress goes to standard error, and is no
part of the output.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from _common import save

COLUMNS = 80
WORDS = ("libortho", "demo", "--out", "demo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    place = parser.parse_args().directory
    sys.argv[1:] = ["PATH"]  # the stored arguments name no directory of this machine
    found = shutil.which(WORDS[0])
    if found is None:
        raise SystemExit("libortho is not on the path; expected an installed package: pip install '.[demo]'")
    place.mkdir(parents=True, exist_ok=True)
    plain = {**os.environ, "COLUMNS": str(COLUMNS), "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([found, *WORDS[1:]], cwd=place, env=plain, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        sys.exit(done.returncode)
    print(done.stdout)
    save("terminal", {"command": " ".join(WORDS), "columns": COLUMNS, "output": done.stdout})


if __name__ == "__main__":
    main()
