"""``libortho serve-key`` and ``serve``, as a shell calls them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import call, refused
from libortho.serving.keys import digest, read_keys


def test_a_key_is_printed_once_and_the_file_keeps_its_hash(tmp_path):
    path = tmp_path / "keys.toml"
    made = call("serve-key", "payroll", "--stream", "hr=1", "--stream", "legal=0.5", "--keys", path)
    key = made.stdout.strip()
    call("serve-key", "other", "--requests-per-minute", 9, "--keys", path)
    first, second = read_keys(path)
    assert (first.id, first.sha256, first.streams) == ("payroll", digest(key), {"hr": 1.0, "legal": 0.5})
    assert (second.id, second.streams, second.requests_per_minute) == ("other", {}, 9)
    assert key not in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("serve-key", "payroll", "--stream", "hr"), "--stream"),
        (("serve-key", "pay roll"), "id is"),
        (("serve", "absent"), "no checkpoint"),
    ],
)
def test_wrong_arguments_are_refused(arguments, told):
    assert told in refused(*arguments)


def test_a_server_says_when_it_is_ready_and_ends_with_a_signal(checkpoint, tmp_path):
    command = [str(Path(sys.executable).with_name("libortho")), "serve", str(checkpoint), "--port", "0", "--name", "m"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
        until = time.monotonic() + 120
        while "serves 'm'" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
    assert "Traceback" not in log.read_text()
