"""An adapter or a merged model on the Hub: what goes there is shown first, nothing else goes."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from idefics_qlora.checkpoint import ADAPTER, ADAPTER_CONFIG, CARD, SHARED
from idefics_qlora.durable import CheckpointError, json_bytes, json_mapping, read_whole
from idefics_qlora.model.loading import read_adapter
from idefics_qlora.model.saved_base import is_hub_id
from idefics_qlora.sharing.card import PICTURES, Facts, facts_of, hub_name, model_card

logger = logging.getLogger(__name__)

_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{20,}")
"""What the Hub's access tokens look like."""
SECONDS = 5.0
"""For the question what licence a base has."""
AGAIN = "run the same again: files that have arrived are not sent again"


@dataclass(frozen=True)
class Upload:
    """What goes to the Hub; as text what the command line shows first."""

    repo_id: str
    private: bool
    files: dict[str, bytes | Path]
    """By their path in the repository."""
    base: str = ""
    """What is known of the base, in a line; empty for a base that is not on the Hub."""

    @property
    def url(self) -> str:
        """Where it is afterwards."""
        return f"{constants.ENDPOINT}/{self.repo_id}"

    def __str__(self) -> str:
        kind = "private" if self.private else "PUBLIC"
        lines = [f"{self.repo_id} ({kind}), {len(self.files)} files:"]
        for path, content in self.files.items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            lines.append(f"  {_size(size):>10}  {path}")
        if self.base:
            lines.append(self.base)
        return "\n".join(lines)

    def send(self) -> None:
        """Make the repository if need be, and upload all files in one commit.

        Raises:
            ConnectionError, PermissionError, ValueError: As :func:`push`.
        """
        api = HfApi()
        operations = [
            CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
            for path, content in self.files.items()
        ]
        try:
            self._make(api)
            message = "Upload with idefics_qlora"
            api.create_commit(self.repo_id, operations, commit_message=message)
        except Exception as error:
            # The client wraps what happens to one of several files.
            cause = error.__cause__ if type(error) is RuntimeError else error
            if (told := self._told(cause)) is None:
                raise
            raise told from error

    def _make(self, api: HfApi) -> None:
        try:
            api.create_repo(self.repo_id, private=self.private)
        except HfHubHTTPError as error:
            # 409: it exists. 403: so it may for a token that may write to it but make none.
            if (status := error.response.status_code) not in (403, 409):
                raise
            try:
                there = api.repo_info(self.repo_id)
            except HfHubHTTPError:
                if status == 403:
                    raise error from None
                raise
            if self.private and not there.private:
                raise ValueError(
                    f"{self.repo_id} exists and is public: pass private=False if everybody may see "
                    "this, or choose another name"
                ) from error

    def _told(self, error: BaseException | None) -> OSError | None:
        """What went wrong with the Hub, and what to do; ``None`` for an error of another kind."""
        if isinstance(error, OfflineModeIsEnabled):
            return ConnectionError(
                f"{self.repo_id} cannot be reached: HF_HUB_OFFLINE is set; unset it"
            )
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status == 401 or isinstance(error, LocalTokenNotFoundError):
            return PermissionError(
                f"the Hub does not know who you are (401): log in with `hf auth login`, or set "
                f"HF_TOKEN to a token that may write to {self.repo_id}"
            )
        if status == 403:
            return PermissionError(
                f"your token may not write to {self.repo_id} (403): take one with permission to "
                "write, and a name in your own namespace or in an organisation where you may write"
            )
        if status in (409, 412):
            return ConnectionError(
                f"{self.repo_id} was changed by somebody else meanwhile ({status}): {AGAIN}"
            )
        if status is not None and (status >= 500 or status == 429):
            return ConnectionError(
                f"the Hub cannot take {self.repo_id} just now ({status}): wait a little and {AGAIN}"
            )
        if status is not None:
            return ConnectionError(f"the Hub refuses {self.repo_id} ({status}): {error}")
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2"):  # the client's
            kind = type(error).__name__
            return ConnectionError(
                f"the connection to the Hub broke off ({kind}: {error}): {AGAIN}"
            )
        return None


def push(
    checkpoint: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    base: str | None = None,
) -> Upload:
    """Upload an adapter, or a merged model, with a model card.

    Of a checkpoint its adapter goes there, with the base's Hub id and without what only a resume
    needs; of a folder that ``merge`` wrote all of it. The card says what the base is and under
    which licence, which settings were trained with, what the evaluation at that step gave (also in
    the card's metadata) and the model said of the run's samples, with pictures, and how to load it.
    Nothing that goes there names a folder of this machine; hidden files stay here.

    Args:
        checkpoint: A run's folder, a ``checkpoint-N`` or any adapter, as in ``load_finetuned``; or
            a folder that ``merge`` wrote.
        repo_id: Where to, such as ``me/name``; made if it is not there.
        private: Whether only you shall see it.
        dry_run: Upload nothing: only say what would be.
        base: Hub id of the base, if what was trained was a local folder.

    Returns:
        What was uploaded, or would be; ``print`` it.

    Raises:
        FileNotFoundError: If the folder holds neither an adapter nor a merged model.
        CheckpointError: If a file is truncated or altered (a ``ValueError``).
        ValueError: If the base has no known Hub id, the name cannot be one, a file seems to hold an
            access token, or the repository is public and must not be.
        PermissionError: If the Hub does not know you, or your token may not write there.
        ConnectionError: If the Hub cannot be reached, has a fault, or the connection broke off.
    """
    upload = planned(checkpoint, repo_id, private=private, base=base)
    if not dry_run:
        logger.info("uploading %s", upload)
        upload.send()
    return upload


def planned(
    checkpoint: str | os.PathLike[str], repo_id: str, *, private: bool, base: str | None
) -> Upload:
    """What :func:`push` uploads; arguments and errors as there."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id):
        raise ValueError(f"repo_id={repo_id!r}: expected a name such as me/name")
    folder = Path(checkpoint).expanduser()
    if (folder / SHARED).is_file() and (folder / "config.json").is_file():
        facts, files = _of_merged(folder, base)
    else:
        facts, files = _of_adapter(folder, base)
    license, told = (None, "") if facts.base is None else _license_of(facts.base)
    card = model_card(facts, repo_id, is_on_hub=True, pictures=PICTURES, license=license)
    files = {CARD: card.encode(), SHARED: json_bytes(vars(facts)), **files}
    for path, content in files.items():
        if _TOKEN.search(content if isinstance(content, bytes) else _text(content)):
            raise ValueError(f"{path} would hold what looks like an access token of the Hub")
    return Upload(repo_id, private, files, told)


def _size(num_bytes: int) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"


def _text(file: Path) -> bytes:
    """What of a file may be text; nothing of weights and pictures, by its beginning."""
    with file.open("rb") as opened:
        return b"" if b"\0" in (start := opened.read(1024)) else start + opened.read()


Files = dict[str, "bytes | Path"]


def _of_merged(folder: Path, base: str | None) -> tuple[Facts, Files]:
    facts = _shared(folder)
    if base is not None and not is_hub_id(base):  # as a name it would tell of this machine
        raise ValueError(f"base={base!r}: expected the Hub id that the card names, its/hub-id")
    if base not in (None, facts.base):
        facts = dataclasses.replace(facts, base=base, base_revision=None)
    inside = ((path, path.relative_to(folder)) for path in sorted(folder.rglob("*")))
    files: Files = {
        name.as_posix(): path
        for path, name in inside
        if path.is_file() and not any(part.startswith(".") for part in name.parts)
        if name.as_posix() not in (CARD, SHARED)
    }
    return facts, files


def _of_adapter(folder: Path, base: str | None) -> tuple[Facts, Files]:
    adapter = read_adapter(folder, base)
    folder = adapter.folder
    config = json_mapping(folder / ADAPTER_CONFIG, read_whole(folder / ADAPTER_CONFIG))
    name, revision = hub_name(os.fspath(adapter.base), adapter.base_revision)
    if name is None:
        raise ValueError(
            f"{folder} was trained on the base in {adapter.base}, which nobody else has: pass "
            "base='its/hub-id', or merge the adapter and push that"
        )
    config |= {"base_model_name_or_path": name, "revision": revision}
    if (folder / SHARED).is_file():  # it comes from the Hub
        facts, pictures = _shared(folder), folder / PICTURES
        facts = dataclasses.replace(facts, base=name, base_revision=revision)
    else:
        facts, pictures = facts_of(config, adapter.state), folder.parent / "eval_samples"
    there = {path.name: path for path in sorted(pictures.glob("*.png"))}
    facts = facts.with_pictures(there)
    shown = [image for sample in facts.samples for image in sample["images"]]
    files: Files = {ADAPTER_CONFIG: json_bytes(config), ADAPTER: folder / ADAPTER}
    return facts, files | {PICTURES + image: there[image] for image in shown}


def _shared(folder: Path) -> Facts:
    values = json_mapping(folder / SHARED, read_whole(folder / SHARED))
    known = {each.name for each in dataclasses.fields(Facts)}
    facts = Facts(**{name: value for name, value in values.items() if name in known})
    try:
        model_card(facts.with_pictures(()), "any", is_on_hub=True, pictures=PICTURES)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / SHARED} is not as merge or push wrote it ({error}): make the folder anew"
        ) from error
    return facts


def _license_of(base: str) -> tuple[str | None, str]:
    """The licence that the base's own card names, by one quick question; and what is known of it.

    Nothing is tried again: a base that cannot be reached must not keep anybody waiting.
    """
    try:
        data = HfApi().model_info(base, timeout=SECONDS).card_data
    except HfHubHTTPError as error:
        why = f"the Hub answers {error.response.status_code}"
        return None, f"the base {base} and its licence: not checked ({why})"
    except Exception as error:  # offline, slow, or a card that cannot be parsed
        why = type(error).__name__
        return None, f"the base {base} and its licence: not reached, not checked ({why})"
    license = None if data is None else data.license
    return license, f"the base {base}: its licence is {license or 'not told by its card'}"
