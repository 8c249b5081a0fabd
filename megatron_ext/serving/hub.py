"""Put a folder on the Hugging Face Hub, into a private repository.

The token comes from the environment, where the worker puts the secrets of the profile; no setting holds one, and what
`hf auth login` left on a machine is not used.
"""

import os
import re
from pathlib import Path

from data_tools.mistake import Problem, UserMistake

TOKEN = "HF_TOKEN"
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def check(repo: str, push: bool) -> list[Problem]:
    """Refuse a repository without `push`, and the other way round."""
    if push and not repo:
        return [Problem("repo", "push needs the repository's name, OWNER/NAME")]
    if repo and not push:
        return [Problem("push", f"is false, and nothing goes to {repo}: set push: true, or leave repo out")]
    if repo and not _REPO.fullmatch(repo):
        return [Problem("repo", f"{repo!r} is no name of a repository: write OWNER/NAME")]
    return []


def upload(folder: Path, repo: str, message: str) -> str:
    """Upload all files of a folder to the private repository, which is made where there is none. Return the commit.

    An upload that was cut short goes on: files that were committed are not sent again (huggingface_hub 2, which cuts a
    large folder into several commits). Raise UserMistake where it is refused, or where the repository is public.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    token = os.environ.get(TOKEN)
    if not token:
        said = f"needs {TOKEN}: name where it lies under env.secrets of the profile ({TOKEN}: file:PATH)"
        raise UserMistake(Problem("push", said))
    api = HfApi(token=token, endpoint=os.environ.get("HF_ENDPOINT") or None)
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        if not api.model_info(repo).private:
            said = f"{repo} is public: make it private on the Hub first, or name another one"
            raise UserMistake(Problem("repo", said))
        return api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message).oid
    except OfflineModeIsEnabled:
        said = "HF_HUB_OFFLINE is set where this phase runs: unset it for its role (env.set of the profile)"
        raise UserMistake(Problem("push", said)) from None
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (401, 403, 404):
            raise
        said = f"the Hub refused it ({' '.join(str(error).split())[:200]}): the token needs write access"
        raise UserMistake(Problem("repo", said)) from None
