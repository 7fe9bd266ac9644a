"""Pushing an exported folder to the Hugging Face Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from preceptor.errors import ModelError, first_line


def require_not_public(repo: str) -> None:
    """Raises ModelError where the model `repo` (owner/name) is on the Hub already, for all to see."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with _explained(repo):
        try:
            is_public = HfApi().model_info(repo).private is False
        except RepositoryNotFoundError:
            return
    if is_public:
        raise ModelError(
            f"{repo}: is on the Hub already, for all to see, and so would be what is pushed there. Allow it with "
            "--public, or name another model with --repo. Nothing was written or pushed"
        )


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder as the model `repo` (owner/name), made where it does not exist; return its address.

    Raises ModelError where the Hub does not take it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _explained(repo):
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by preceptor export")
    return address


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever its HTTP client raises: no connection, no right, no such owner
        raise ModelError(
            f"{repo}: cannot be pushed to the Hub: {first_line(error)}. Log in with a token that may write "
            "(`hf auth login`, or HF_TOKEN)"
        ) from error
