"""Put a checkpoint on the Hugging Face hub: the base, and a stream only if it is named."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from libortho.checkpoint.card import model_card
from libortho.checkpoint.files import CERTIFICATE, README
from libortho.checkpoint.manifest import BaseManifest
from libortho.checkpoint.proof import check_base
from libortho.checkpoint.stream_files import StreamManifest, choose_streams, read_stream
from libortho.core.errors import CheckpointError


def push_to_hub(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    streams: str | Iterable[str] | None = None,
    token: str | None = None,
) -> str:
    """Upload a checkpoint: files that ``save`` wrote, README.md and a certificate, and nothing else.

    A stream that an earlier upload brought to the repository stays in it, and in its history; delete the repository to
    take it back.

    Args:
        directory: A checkpoint.
        repo_id: Repository, ``owner/name``; created if it does not exist.
        private: Whether a new repository is private.
        streams: Streams to upload: None for the base alone, ``"all"``, or a list of names. What a stream holds is what
            was to be kept away from others; it is never uploaded unless it is asked for.
        token: Access token; None takes the one that ``hf auth login`` stored.

    Returns:
        Address of the commit.

    Raises:
        CheckpointError: if the checkpoint is damaged or has not such a stream; nothing is uploaded then.
        huggingface_hub.errors.HfHubHTTPError: if the hub refuses.
    """
    root = Path(directory)
    base = BaseManifest.read(root)
    base.check_files(root)
    names = [] if streams is None else choose_streams(root, streams)
    if streams is not None and not names:
        raise CheckpointError(f"{root} has no stream to upload: streams is {streams!r}; None uploads the base alone")
    check_base(root, base)
    for name in names:
        read_stream(root, name, base)
    files = [*base.file_names, CERTIFICATE, README]
    files += [path for name in names for path in StreamManifest.read(root, name, base).paths]
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    try:
        commit = api.upload_folder(
            repo_id=repo, folder_path=root, allow_patterns=[glob.escape(f) for f in files],
            ignore_patterns=[] if names else ["ortho/*"], commit_message="LibOrtho checkpoint",
        )  # fmt: skip
    except RuntimeError as error:  # in which the library wraps a refusal of the store of large files
        if isinstance(error.__cause__, HfHubHTTPError):
            raise error.__cause__ from None
        raise
    if not (root / README).is_file() and not api.file_exists(repo, README):
        card = model_card(root, streams=names)
        commit = api.upload_file(
            path_or_fileobj=card.encode(), path_in_repo=README, repo_id=repo, commit_message="Model card"
        )
    return str(commit.commit_url)
