"""Pushing an exported folder to the Hugging Face Hub."""

from pathlib import Path

from preceptor.errors import ModelError, first_line


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder as the model `repo` (owner/name), made where it does not exist; return its address.

    Raises ModelError where the Hub does not take it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by preceptor export")
    except Exception as error:  # whatever its HTTP client raises: no connection, no right, no such owner
        raise ModelError(
            f"{repo}: cannot be pushed to the Hub: {first_line(error)}. Log in with a token that may write "
            "(`hf auth login`, or HF_TOKEN)"
        ) from error
    return address
