"""An export to the Hugging Face Hub: what would be sent, and on confirmation the sending."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from surefoot.errors import BackendError, UsageError
from surefoot.export import records
from surefoot.json_file import read_json

NAME = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*$")


def check(name: str) -> None:
    """Raises UsageError unless `name` is OWNER/NAME."""
    if not NAME.match(name):
        raise UsageError(f"--push_to_hub={name} must be OWNER/NAME")


def push(folder: Path, name: str, *, is_confirmed: bool, say: Callable[[str], object]) -> None:
    """Lists what goes to the private repository `name`; sends it only when confirmed.

    Raises:
        UsageError: the folder holds no export whose parity holds. BackendError: the Hub refused.
    """
    check(name)
    verdict = read_json(folder / records.PARITY).get("verdict")
    if verdict != "holds":
        state = f"its parity verdict is: {verdict}" if verdict else "it has no parity.json"
        raise UsageError(f"{folder} is not pushed: {state}. Export it again with --parity=True")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    say(f"{'pushing' if is_confirmed else 'dry run: would push'} {len(files)} files to {name} (private; made if it does not exist)")
    for file in files:
        say(f"  {file.stat().st_size:>15,} bytes  {file.relative_to(folder)}")
    if not is_confirmed:
        say("nothing was sent; --confirm_push sends it")
        return
    _send(folder, name)
    say(f"done: https://huggingface.co/{name}")


def _send(folder: Path, name: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        api = HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise BackendError(f"--push_to_hub={name}: the Hub refused ({str(error).strip().splitlines()[0]}). Log in: hf auth login") from None
