"""Uploads of a folder to a repository on the Hugging Face hub."""

from pathlib import Path

import huggingface_hub

from kd_jax.storage import hub

TOKENS = "https://huggingface.co/settings/tokens"


def check(address: str) -> None:
    """Checks before a run that its upload can begin: the address is a model's, and the hub accepts the token.

    Raises:
      ValueError: the address has another form, or there is no token, or the hub refuses the token.
      ConnectionError: the hub cannot be reached.
    """
    if hub.parse(address, "model").revision:
        raise ValueError(f"{address}: a student is uploaded to the branch main; leave out @REVISION.")
    if not huggingface_hub.get_token():
        raise ValueError(
            f"{address}: an upload needs a token that may write. Make a token on {TOKENS}, and log in with `hf auth login` "
            f"or set HF_TOKEN; or leave push empty."
        )
    with hub.explained(address):
        huggingface_hub.HfApi().whoami()


def upload(folder: Path, address: str, private: bool, message: str) -> str:
    """Uploads the files of a folder in one commit, to a repository that is created if it does not exist.

    Args:
      folder: the folder.
      address: the address of the repository.
      private: True to create the repository as private. The visibility of an existing repository is not changed.
      message: the message of the commit.

    Returns:
      The web address of the repository.

    Raises:
      ValueError: the hub refuses the upload.
      ConnectionError: the hub cannot be reached, or answers with another error.
    """
    api, name = huggingface_hub.HfApi(), hub.parse(address, "model").id
    with hub.explained(address):
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    return str(url)
