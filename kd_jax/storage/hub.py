"""Models and datasets of the Hugging Face hub, named by addresses.

`hf://ORG/NAME` is a model, and `hf://datasets/ORG/NAME` a dataset. `@REVISION` may follow the name: a branch, a tag or a
commit. After the name of a dataset, `/FILE` or `/FOLDER` may follow. The package `huggingface_hub` downloads the files to
its cache ($HF_HOME, by default ~/.cache/huggingface), with its token ($HF_TOKEN, or the login of `hf auth login`). Of the
processes of a host, one downloads a file, and the others wait at the lock of the file in the cache.

A branch may move. So a process resolves an address to a commit only once. A run records the commits (see
`directory.read_commits`), and a resumed run reads the same commits. The files are untrusted, and no code is run.
"""

import contextlib
import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import huggingface_hub
import jax
from huggingface_hub import constants, errors

from kd_jax import sharding, storage
from kd_jax.storage.files import AnyPath

HUB = "hf://"
KINDS = ("model", "dataset")
FORMS = "hf://ORG/NAME or hf://ORG/NAME@REVISION for a model, and hf://datasets/ORG/NAME@REVISION/FILE for a dataset"
# The files of a model that kd_jax reads. The weights of some folders exist a second time, in a file consolidated*.
CONFIGS = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.*", "*.safetensors.index.json",
)  # fmt: skip
WEIGHTS = (*CONFIGS, "*.safetensors")
IGNORED = ("*/*", "consolidated*")
DATA = ("*.jsonl", "*.jsonl.gz", "*.json", "*.parquet", "*.arrow", "*.txt")  # the files of a folder of data

_keys: dict[str, str] = {}  # an address -> the key or the flag that names the address, for messages
_commits: dict[str, str] = {}  # the address of a repository -> its commit in this process
_folders: dict[tuple[str, ...], Path] = {}  # a repository, its commit and patterns -> the folder in the cache
Uri = huggingface_hub.HfUri


def is_hub(path: AnyPath) -> bool:
    """Returns True if a path is an address on the hub."""
    return str(path).startswith(HUB)


def named(address: str) -> str:
    """Returns an address after the key of the config, or the flag, that `settle` knows for it."""
    return f"{_keys[address]}={address}" if address in _keys else address


def parse(address: str, kind: str = "") -> Uri:
    """Returns the parts of an address: type, id, revision and path_in_repo.

    Args:
      address: the address.
      kind: 'model' or 'dataset' to refuse an address of the other kind; "" for both.

    Raises:
      ValueError: the address has another form, or names something of another kind.

    Example:
      >>> uri = parse("hf://datasets/org/rows@v1/train.jsonl")
      >>> uri.type, uri.id, uri.revision, uri.path_in_repo
      ('dataset', 'org/rows', 'v1', 'train.jsonl')
    """
    try:
        uri = huggingface_hub.parse_hf_uri(address)
    except errors.HfUriError as error:
        reason = " ".join(str(error).partition("'. ")[2].split()).rstrip(".")
        raise ValueError(
            f"{named(address)} is no address on the Hugging Face hub ({reason}); write {FORMS}."
        ) from error
    if uri.type not in ((kind,) if kind else KINDS):
        raise ValueError(
            f"{named(address)} names a {uri.type}, and not a {kind or 'model or a dataset'}; write {FORMS}."
        )
    if uri.type == "model" and uri.path_in_repo:
        raise ValueError(
            f"{named(address)}: the files of a model are at the root of its repository; leave out /{uri.path_in_repo}."
        )
    return uri


def repository(address: str) -> str:
    """Returns the address of the repository of a model or a dataset, with the revision.

    Example:
      >>> repository("hf://datasets/org/rows/train.jsonl"), repository("hf://org/model@v1")
      ('hf://datasets/org/rows@main', 'hf://org/model@v1')
    """
    uri = parse(address)
    prefix = "datasets/" if uri.type == "dataset" else ""
    return f"{HUB}{prefix}{uri.id}@{uri.revision or constants.DEFAULT_REVISION}"


def commit(address: str) -> str:
    """Returns the commit of an address. Only the first call in a process for a repository asks the hub.

    Without a connection this is the commit of the last download.

    Raises:
      ValueError: the address, the repository or the revision is wrong, or the repository is gated.
      ConnectionError: the hub cannot be reached, and the repository was not downloaded before.
    """
    name = repository(address)
    if name not in _commits:
        uri = parse(address)
        with explained(address):
            found = huggingface_hub.HfApi().resolve_revision(uri.id, repo_type=uri.type, revision=uri.revision)
        _commits[name] = found.resolved
    return _commits[name]


def settle(keys: Mapping[str, str], recorded: Mapping[str, str] | None = None) -> None:
    """Decides the commit of each repository, for all processes of a run.

    All processes must call this function with the same addresses. Only the first process asks the hub. If there is an
    error, all processes raise it.

    Args:
      keys: address -> the key of the config or the flag that names the address, for messages.
      recorded: the commits that the run has recorded, by repository. They have priority over all other commits.

    Raises:
      ValueError, ConnectionError: as in `commit`.
    """
    if not keys:
        return
    commits: dict[str, str] = {}
    problem, is_lost = "", False
    _keys.update(keys)
    for address in keys if jax.process_index() == 0 else ():
        try:
            name = repository(address)
            commits[name] = (recorded or {}).get(name) or commit(address)
        except (ValueError, OSError) as error:
            problem, is_lost = str(error), isinstance(error, OSError)
            break
    commits, problem, is_lost = json.loads(sharding.text_from_first_process(json.dumps([commits, problem, is_lost])))
    if problem:
        raise ConnectionError(problem) if is_lost else ValueError(problem)
    _commits.update(commits)


def model(path: AnyPath, weights: bool = True) -> Path:
    """Returns the local folder of a model. An address is downloaded, unless the cache has the files.

    Args:
      path: a local path, which is returned unchanged apart from `~`, or an address.
      weights: False to download only the configuration and the tokenizer.

    Raises:
      ValueError: the address, the repository or the revision is wrong, the repository is gated, or its weights are in
        another form than safetensors.
      ConnectionError: the hub cannot be reached, and the files were not downloaded before.
    """
    address = str(path)
    if not is_hub(address):
        return Path(path).expanduser()
    parse(address, "model")
    folder = _snapshot(address, CONFIGS, IGNORED)
    if not folder.is_dir():
        raise ValueError(f"{named(address)}: the repository has none of the files of a model{_files_of(address)}.")
    if not weights:
        return folder
    folder = _snapshot(address, WEIGHTS, IGNORED)
    if not any(folder.glob("*.safetensors")):
        _refuse_other_weights(address)
    return folder


def data(address: str) -> Path:
    """Returns the local path of a file or a folder of a dataset, which is downloaded unless the cache has the files.

    Args:
      address: the address of a file, of a folder, or of the whole repository. Of a folder, the files in DATA are
        downloaded.

    Raises:
      ValueError: the address, the repository, the revision or the file is wrong, or the repository is gated.
      ConnectionError: the hub cannot be reached, and the files were not downloaded before.
    """
    uri = parse(address, "dataset")
    name = uri.path_in_repo.rstrip("/")
    exact = glob.escape(name)
    patterns = (exact, *(f"{exact}/{pattern}" for pattern in DATA)) if name else DATA
    path = _snapshot(address, patterns) / name
    if not path.exists():
        raise ValueError(f"{named(address)}: the repository {uri.id} has no file or folder {name}{_files_of(address)}.")
    return path


def data_files(pattern: str) -> list[str]:
    """Returns the local paths of the files of a dataset that match a pattern such as hf://datasets/ORG/NAME/*.txt."""
    uri = parse(pattern, "dataset")
    folder = _snapshot(pattern, (uri.path_in_repo or "*",))
    return sorted(glob.glob(str(Path(glob.escape(str(folder))) / (uri.path_in_repo or "*")), recursive=True))


def _snapshot(address: str, patterns: tuple[str, ...], ignored: tuple[str, ...] = ()) -> Path:
    """Returns the folder of a commit in the cache, with the files that match the patterns."""
    uri, revision = parse(address), commit(address)
    key = (repository(address), revision, *patterns)
    if key not in _folders:
        with explained(address), storage.room(constants.HF_HUB_CACHE):
            _folders[key] = Path(
                huggingface_hub.snapshot_download(
                    uri.id,
                    repo_type=uri.type,
                    revision=revision,
                    allow_patterns=list(patterns),
                    ignore_patterns=list(ignored),
                )
            )
    return _folders[key]


def _names(address: str) -> list[str]:
    """Returns the names of the files of a repository; [] without a connection."""
    uri = parse(address)
    with contextlib.suppress(Exception):  # the names only make a message clearer
        return huggingface_hub.HfApi().list_repo_files(uri.id, repo_type=uri.type, revision=commit(address))
    return []


def _files_of(address: str) -> str:
    names = [name for name in _names(address) if not name.startswith(".")]
    return f"; the files are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else ""


def _refuse_other_weights(address: str) -> None:
    """Refuses a repository without safetensors."""
    uri, others = (
        parse(address),
        [name for name in _names(address) if name.endswith((".bin", ".h5", ".msgpack", ".gguf"))],
    )
    has = f"only {', '.join(others[:3])}" if others else "no weights"
    raise ValueError(
        f"{named(address)}: the repository has {has}, and kd_jax reads weights in safetensors only, because pickled files can run "
        f"code when read. Look for a converted copy: https://huggingface.co/{uri.id}/discussions may have one as a pull request "
        f"(hf://{uri.id}@refs/pr/1). Or convert the model with transformers' save_pretrained, and give the folder."
    )


@contextlib.contextmanager
def explained(address: str) -> Iterator[None]:
    """Turns any error of the hub in a block into one paragraph that names the address.

    Raises:
      ValueError: the repository is gated or missing, or the revision does not exist.
      ConnectionError: the hub cannot be reached, and the cache does not have the files; or the hub answers with another
        error.
    """
    uri = parse(address)
    page = f"https://huggingface.co/{'datasets/' if uri.type == 'dataset' else ''}{uri.id}"
    try:
        yield
    except storage.StorageError:
        raise
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{named(address)}: the repository is gated. Accept the conditions on {page}, and log in with "
            f"`hf auth login` or set HF_TOKEN to a token of the same account{_token()}."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{named(address)}: the hub has no {uri.type} {uri.id}, or the repository is private. Correct the name, or log in with "
            f"`hf auth login` or set HF_TOKEN{_token()}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"{named(address)}: the repository has no revision {_commits.get(repository(address)) or uri.revision}. Its "
            f"branches and tags are listed on {page}/tree/main; without @REVISION the branch main is used."
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ValueError(
                f"{named(address)}: the hub refuses access (status {status}). Log in with `hf auth login`, or set HF_TOKEN "
                f"to a token that may read or write this repository{_token()}."
            ) from error
        raise ConnectionError(
            f"{named(address)}: the hub answers with an error, {_short(error)}. Try again later."
        ) from error
    except (errors.HTTPError, errors.RevisionResolutionError, errors.LocalEntryNotFoundError, OSError) as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            answer = _short(error.__cause__)
            raise ConnectionError(
                f"{named(address)}: the hub answers with an error, {answer}. Try again later."
            ) from error
        reason = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"there is no connection: {_short(error)}"
        kind = " --repo-type dataset" if uri.type == "dataset" else ""
        at = f" --revision {uri.revision}" if uri.revision else ""
        raise ConnectionError(
            f"{named(address)} is not, or not completely, in the cache {constants.HF_HUB_CACHE}, and the hub cannot be reached "
            f"({reason}). Download the repository before, with `hf download {uri.id}{kind}{at}` on a machine with a connection; "
            f"HF_HOME names the folder of the cache."
        ) from error


def _token() -> str:
    return "" if huggingface_hub.get_token() else " (no token is set now)"


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
