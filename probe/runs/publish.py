"""A run as a dataset repository of the Hugging Face hub: pushed with a card, pulled with every checksum compared."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from probe.errors import ArtifactCorrupt, DiskError, ProbeError, RunDirectoryError, UsageError
from probe.runs.edits import edits_text
from probe.runs.files import ENDED, MANIFEST, disk_errors
from probe.runs.manifest import listed_files, read_manifest
from probe.runs.read import Run
from probe.runs.summary import score_text, summary
from probe.runs.verify import verify
from probe.runs.write import prepare

CARD = "README.md"
_KIND = "dataset"
_UNFIT = re.compile(r"[`|\s]+|[^\x20-\x7e\u00a0-\uffff]")
"""What does not stand in inline code of a table."""


def push(
    run: Run, repository: str, *, public: bool = False, message: str | None = None, api: Any = None
) -> str:
    """Upload a run to the dataset repository OWNER/NAME, which is made where there is none, private unless `public`; returns
    the name of the commit. `api` is a `huggingface_hub.HfApi`, by default that of the user who is logged in.

    Raises RunDirectoryError for a run that has not ended, ArtifactCorrupt for a damaged one, UsageError and DiskError.
    """
    from huggingface_hub import CommitOperationAdd

    report = verify(run.path)
    if report.problems:
        raise ArtifactCorrupt(
            f"{run.path}: is damaged and is not pushed: `probe verify {run.path}` says where"
        )
    if not report.complete or report.status not in ENDED:
        raise RunDirectoryError(f"{run.path}: has not ended: `probe resume {run.path}` first")
    manifest = read_manifest(run.path)
    assert manifest is not None
    names = [MANIFEST, *listed_files(run.path, manifest)]
    api = _api(api)
    with _hub_errors(repository):
        api.create_repo(repository, repo_type=_KIND, private=not public, exist_ok=True)
        commit = api.create_commit(
            repository,
            [
                CommitOperationAdd(CARD, card(run, repository).encode()),
                *(CommitOperationAdd(name, str(run.path / name)) for name in names),
            ],
            repo_type=_KIND,
            commit_message=message or f"Add the run {run.path.name}",
        )
    return str(commit.oid)


def pull(repository: str, path: Path, *, revision: str | None = None, api: Any = None) -> Run:
    """Download a run from a dataset repository into `path`, new or empty, and open it. Only files that its manifest lists are
    fetched, all of one commit, and all checksums are compared before the run appears.

    Raises UsageError (no such repository, or one without a run), ArtifactCorrupt, RunDirectoryError and DiskError.
    """
    path = Path(path)
    prepare(path)
    api = _api(api)
    new = path.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        with disk_errors(path):
            new.mkdir(parents=True)
        with _hub_errors(repository):
            given = {"repo_id": repository, "repo_type": _KIND}
            given["revision"] = api.repo_info(repository, repo_type=_KIND, revision=revision).sha
            api.hf_hub_download(filename=MANIFEST, local_dir=str(new), **given)
            manifest = read_manifest(new)
            assert manifest is not None
            files = [MANIFEST, *listed_files(new, manifest)]
            api.snapshot_download(allow_patterns=files, local_dir=str(new), **given)
        with disk_errors(path):
            shutil.rmtree(new / ".cache", ignore_errors=True)  # the client's notes
        if problems := verify(new).problems:
            raise ArtifactCorrupt(
                f"{repository}: {problems[0]}: what was pushed is another file: pull another revision"
            )
        with disk_errors(path):
            new.replace(path) if not path.exists() else _into(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return Run(path)


def _into(new: Path, path: Path) -> None:
    """Move a run into an empty directory that is there; the manifest, which says that it is whole, last."""
    for entry in sorted(new.iterdir(), key=lambda entry: entry.name == MANIFEST):
        entry.replace(path / entry.name)


def card(run: Run, repository: str) -> str:
    """The README of a run's repository: what ran, its scores with intervals, and how it is read."""
    header, totals = run.run, summary(run)
    model = header.get("model") or {}
    facts = [
        ("model", model.get("name")),
        ("weights", model.get("weights_hash")),
        ("dtype", model.get("dtype")),
        ("device", model.get("device")),
        ("tasks", ", ".join(f"{n} {status}" for status, n in totals["counts"].items())),
        ("edits", edits_text(header)),
        ("made", header.get("created")),
        *((f"score, {kind}", score_text(value)) for kind, value in totals["accuracy"].items()),
    ]
    rows = "".join(f"| {_code(name)} | {_code(value)} |\n" for name, value in facts if value)
    return (
        "---\ntags:\n- probe\n- interpretability\nviewer: false\n---\n\n"
        f"# A run of probe\n\n| | |\n|---|---|\n{rows}\n"
        "What a language model did on each task, and what happened inside it: prompts, probabilities, hidden states and attention, "
        "with a checksum of every file.\n\n"
        f"```\npip install probe-harness\nprobe pull {repository}\n```\n\n"
        "`probe.open` reads it in Python; `report.html`, where there is one, opens by itself.\n"
    )


def _code(value: Any) -> str:
    """A value as inline code of a table: a name of a model or a file may say anything."""
    return f"`{_UNFIT.sub(' ', str(value)).strip()[:200]}`"


def _api(api: Any) -> Any:
    if api is not None:
        return api
    from huggingface_hub import HfApi

    return HfApi()


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """What the hub's client raises, as errors of this package."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (RepositoryNotFoundError, LocalTokenNotFoundError):
        raise UsageError(
            f"{repository}: no such dataset repository, or none that you may use: check the name, and log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UsageError(f"{repository}: has no such revision: give a branch, a tag or a commit") from None
    except LocalEntryNotFoundError as error:
        raise _unreachable(repository, error) from None
    except EntryNotFoundError as error:
        raise UsageError(f"{repository}: holds no run: {_first(error)}") from None
    except HFValidationError as error:
        raise UsageError(
            f"{repository}: is no name of a repository: write OWNER/NAME ({_first(error)})"
        ) from None
    except ProbeError:
        raise
    except Exception as error:  # the client's network library has errors of its own, which are no OSError
        if isinstance(error, OSError) and error.errno and error.filename:
            raise DiskError(f"{error.filename}: {error.strerror}") from None
        raise _unreachable(repository, error) from None


def _unreachable(repository: str, error: Exception) -> DiskError:
    return DiskError(
        f"{repository}: the hub cannot be used: {_first(error)}: try again, or check the network"
    )


def _first(error: Exception) -> str:
    with suppress(IndexError):
        return str(error).strip().splitlines()[0]
    return type(error).__name__
