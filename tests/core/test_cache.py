"""The cache is where it was said to be, and what somebody else could have put there is neither run nor believed."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from libortho.core.cache import cache_directory, make_private, private_path
from libortho.core.errors import ConfigError, KernelError
from libortho.core.ops import native
from libortho.demo.model import packaged_model
from libortho.isolation.retain import default_retain

OTHER = 12345


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LIBORTHO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


# -- where it is ------------------------------------------------------------------------------------------------------


def test_the_places_in_their_order(home, monkeypatch):
    assert cache_directory() == home / ".cache/libortho"
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert cache_directory() == Path("/shared/libortho")
    monkeypatch.setenv("LIBORTHO_CACHE", "/own")
    assert cache_directory() == Path("/own")


@pytest.mark.parametrize("relative", ["", ".", "cache", "./cache", "../cache", "~/cache"])
def test_a_relative_xdg_place_is_ignored(home, monkeypatch, relative):
    monkeypatch.setenv("XDG_CACHE_HOME", relative)
    assert cache_directory() == home / ".cache/libortho"


@pytest.mark.parametrize("relative", [".", "cache", "../cache", "~/cache"])
def test_a_relative_place_of_our_own_is_refused(home, monkeypatch, relative):
    monkeypatch.setenv("LIBORTHO_CACHE", relative)
    with pytest.raises(ConfigError, match="expected an absolute path"):
        cache_directory()
    with pytest.warns(UserWarning, match="torch's kernels are used.*expected an absolute path"):
        assert native.load() is None
    with pytest.raises(KernelError, match="expected an absolute path"):
        native.build()


def test_a_relative_home_is_refused(home, monkeypatch):
    monkeypatch.setenv("HOME", ".")
    with pytest.raises(ConfigError, match=r"home directory is '\.'"):
        cache_directory()


# -- whose it is ------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A file two private folders deep."""
    (tmp_path / "a/b").mkdir(parents=True, mode=0o700)
    (tmp_path / "a/b/file").write_text("x")
    return tmp_path / "a/b/file"


def owned(monkeypatch: pytest.MonkeyPatch, path: Path, uid: int | None = None, gid: int | None = None) -> None:
    """Let a file or folder seem to belong to others; a test cannot give it away."""
    real = Path.lstat

    def lstat(self: Path) -> Any:
        found = real(self)
        if self != path:
            return found
        return SimpleNamespace(
            st_uid=found.st_uid if uid is None else uid, st_gid=found.st_gid if gid is None else gid,
            st_mode=found.st_mode,
        )  # fmt: skip

    monkeypatch.setattr(Path, "lstat", lstat)


SAFE: dict[str, Callable[[Path, Any], Any]] = {
    "private": lambda p, m: p.parent.chmod(0o700),
    "readable": lambda p, m: p.parent.chmod(0o755),
    "own group": lambda p, m: (p.chmod(0o664), p.parent.chmod(0o775)),
    "of root": lambda p, m: owned(m, p.parent, uid=0),
    "a sticky folder above": lambda p, m: p.parents[1].chmod(0o1777),
    "what is not there yet": lambda p, m: p.unlink(),
    "no folder yet in a sticky one": lambda p, m: (p.unlink(), p.parent.rmdir(), p.parents[1].chmod(0o1777)),
}
UNSAFE: dict[str, tuple[Callable[[Path, Any], Any], str]] = {
    "file of another": (lambda p, m: owned(m, p, uid=OTHER), f"belongs to the user {OTHER}"),
    "folder of another": (lambda p, m: owned(m, p.parent, uid=OTHER), f"belongs to the user {OTHER}"),
    "folder above of another": (lambda p, m: owned(m, p.parents[1], uid=OTHER), "belongs to the user"),
    "sticky folder of another": (
        lambda p, m: (p.parents[1].chmod(0o1777), owned(m, p.parents[1], uid=OTHER)), "belongs to the user",
    ),
    "file for all": (lambda p, m: p.chmod(0o666), "everybody"),
    "folder for all": (lambda p, m: p.parent.chmod(0o777), "everybody"),
    "folder above for all": (lambda p, m: p.parents[1].chmod(0o777), "everybody"),
    "file for another group": (lambda p, m: (p.chmod(0o664), owned(m, p, gid=OTHER)), f"the group {OTHER}"),
    "folder for another group": (lambda p, m: (p.parent.chmod(0o770), owned(m, p.parent, gid=OTHER)), "the group"),
    "no folder yet in one for all": (
        lambda p, m: (p.unlink(), p.parent.rmdir(), p.parents[1].chmod(0o777)), "everybody",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAFE)
def test_private_places(place, monkeypatch, case):
    SAFE[case](place, monkeypatch)
    assert private_path(place) == place.resolve()


@pytest.mark.parametrize("case", UNSAFE)
def test_places_of_others(place, monkeypatch, case):
    prepare, reason = UNSAFE[case]
    prepare(place, monkeypatch)
    with pytest.raises(ConfigError, match=reason):
        private_path(place)


def test_links_are_followed_to_where_they_lead(place, tmp_path):
    (tmp_path / "link").symlink_to(place.parents[1])
    assert private_path(tmp_path / "link/b/file") == place.resolve()
    place.parent.chmod(0o777)
    with pytest.raises(ConfigError, match="everybody"):
        private_path(tmp_path / "link/b/file")


def test_folders_are_made_for_their_owner_alone(tmp_path):
    before = os.umask(0)
    try:
        made = make_private(tmp_path / "x/y/z")
    finally:
        os.umask(before)
    assert made == (tmp_path / "x/y/z").resolve()
    assert {p.stat().st_mode & 0o777 for p in (made, made.parent, made.parents[1])} == {0o700}
    assert make_private(tmp_path / "x/y/z") == made


def test_no_folder_is_made_where_others_can_write(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="everybody"):
        make_private(tmp_path / "open/x/y")
    assert not list((tmp_path / "open").iterdir())


# -- who asks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_cache(cache: Path) -> Path:
    """A cache into which everybody writes."""
    cache.mkdir()
    cache.chmod(0o777)
    return cache


def plant_kernels(folder: Path) -> None:
    """Something that would be loaded as compiled kernels, and does not load."""
    folder.mkdir(parents=True)
    (folder / f"libortho_native{EXTENSION_SUFFIXES[-1]}").write_bytes(b"no library")


def test_kernels_that_another_can_have_written_are_not_loaded(open_cache):
    plant_kernels(native.build_directory())
    with pytest.warns(UserWarning, match="torch's kernels are used, no compiled ones.*everybody"):
        assert native.load() is None
    with pytest.raises(KernelError, match="everybody"):
        native.build()


def test_importing_the_library_runs_nothing_from_the_working_directory(tmp_path):
    """A relative XDG_CACHE_HOME, and a build below it."""
    folder = native.build_directory()
    plant_kernels(tmp_path / "cache/libortho/kernels" / folder.name)
    environment = {**os.environ, "XDG_CACHE_HOME": "cache", "HOME": str(tmp_path / "home")}
    environment.pop("LIBORTHO_CACHE", None)
    code = "import libortho; from libortho.core.ops import native; print(native.kernels())"
    command = [sys.executable, "-W", "error::UserWarning:libortho", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
    assert "does not load" not in done.stderr
    environment["LIBORTHO_CACHE"] = "cache/libortho"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert "expected an absolute path" in done.stderr


def test_no_model_is_taken_from_a_place_of_others(open_cache):
    (open_cache / "smollm2-135m-instruct").mkdir()
    (open_cache / "smollm2-135m-instruct/config.json").write_text("{}")
    with pytest.raises(ConfigError, match="everybody"):
        packaged_model()


def test_no_sample_is_taken_from_or_left_in_a_place_of_others(open_cache, planted, tokenizer, caplog, monkeypatch):
    items = tiny.encoded(tokenizer)
    given = {"sequences": 8, "length": 16, "seed": 0}
    found = default_retain(planted, tokenizer, items, **given)
    assert "drawn anew, and not kept" in caplog.text
    assert not list(open_cache.iterdir())
    open_cache.chmod(0o700)
    assert default_retain(planted, tokenizer, items, **given) == found
    [kept] = (open_cache / "samples").iterdir()
    kept.write_text("[[5, 6, 7]]")
    planted_by_us = default_retain(planted, tokenizer, items, **given)
    assert planted_by_us != found
    open_cache.chmod(0o777)
    assert default_retain(planted, tokenizer, items, **given) == found
